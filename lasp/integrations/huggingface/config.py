"""lasp's configuration as one of Transformers'."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from lasp.config import ModelConfig, require
from lasp.fields import from_dict
from lasp.integrations.huggingface.cache import CACHE

CODE = "modeling_lasp"  # the module that is saved beside the weights, for trust_remote_code


class LaspConfig(PretrainedConfig):
    """The fields of `lasp.config.ModelConfig`, validated as there, and Transformers' common ones.

    Where Transformers has a name of its own for one of them (`attribute_map`), that may be given as well.
    """

    model_type = "lasp"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012 (the library's name for it)
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, **kwargs: Any):
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                value = kwargs.pop(theirs)
                same = kwargs.setdefault(ours, value) == value
                require(same, theirs, value, f"{kwargs[ours]!r}, as {ours} says, which is the same")
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        shape = from_dict(ModelConfig, {name: kwargs.pop(name) for name in names if name in kwargs})
        require(not shape.is_own, "model", shape.model_class or shape.mixer, "one of lasp's")
        require(shape.num_experts == 0, "num_experts", shape.num_experts, "0: mixtures of experts are not exchanged")
        auto_map = {"AutoConfig": f"{CODE}.LaspConfig", "AutoModelForCausalLM": f"{CODE}.LaspForCausalLM"}
        super().__init__(**{"auto_map": auto_map, **kwargs})
        for name in names:
            setattr(self, name, getattr(shape, name))

    @classmethod
    def of(cls, shape: ModelConfig, **kwargs: Any) -> "LaspConfig":
        """The configuration of a model of this shape."""
        return cls(**dataclasses.asdict(shape), **kwargs)

    @property
    def shape(self) -> ModelConfig:
        """The same as lasp's own configuration."""
        return ModelConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)})
