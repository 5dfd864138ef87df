"""Hugging Face Transformers: lasp's decoders as a model class of theirs. Needs lasp's extra `huggingface`.

Importing this module registers the classes, so that

    AutoModelForCausalLM.from_pretrained(directory)

loads what `to_huggingface(decoder).save_pretrained(directory)` wrote, without remote code. Weights keep lasp's names
and layout behind the prefix `decoder.`, so that nothing is rounded or permuted on the way.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lasp.config import ModelConfig, require
from lasp.models import Decoder, Memory
from lasp.models.decays import ConstantDecay
from lasp.models.layers import at_least_float32
from lasp.parallel import SequenceParallel

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name there


class LaspConfig(PretrainedConfig):
    """The fields of `lasp.config.ModelConfig`, validated as there, and Transformers' common ones."""

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
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        shape = ModelConfig(**{name: kwargs.pop(name) for name in names if name in kwargs})
        require(shape.num_experts == 0, "num_experts", shape.num_experts, "0: mixtures of experts are not exchanged")
        super().__init__(**kwargs)
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


class RecurrentCache(Memory):
    """lasp's memory with the methods that `generate` calls of a cache. Its size grows in softmax layers only."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what was row beam_idx[i] (beam search)."""

        def reorder(slot: Any) -> Any:
            if isinstance(slot, tuple):
                return tuple(reorder(x) for x in slot)
            return slot.index_select(0, beam_idx.to(slot.device))

        for layer, slots in self.slots.items():
            self.slots[layer] = [reorder(slot) for slot in slots]


class LaspForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Decoder`, on one device, with the calling convention of Transformers. Works with `generate`."""

    config_class = LaspConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: LaspConfig):
        super().__init__(config)
        self.decoder = Decoder(config.shape)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, vocabulary] of the next token at each of input_ids [B, T], int64.

        past_key_values: a RecurrentCache, what came before these tokens; updated in place. From Transformers 5.24 on it
            is called `cache`, here and in what is returned.
        labels: [B, T], not shifted, -100 where there is none.
        Raises ValueError if attention_mask masks anything: a recurrent state has no place for padding.
        """
        whole = attention_mask is None or bool(attention_mask.all())
        require(whole, "attention_mask", "masked tokens", "no padding: sequences of one length in a batch")
        memory = past_key_values if cache is None else cache
        if use_cache and memory is None:
            memory = RecurrentCache()
        seq = SequenceParallel(None, device=input_ids.device).sequence(input_ids.shape[1])
        logits = self.decoder(input_ids, seq, memory=memory)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: memory})
        return output if return_dict in (None, True) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.decoder.head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def _init_weights(self, module: Any) -> None:
        """Called for what is not in a checkpoint: buffers always, parameters of a module that are missing."""
        if isinstance(module, ConstantDecay):
            module.log_decay = at_least_float32(module.log_decay)  # a half model's decays, too
        if not hasattr(module, "init_parameters"):
            super()._init_weights(module)
        elif not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False)):
            with torch.no_grad():
                module.init_parameters(None)


AutoConfig.register(LaspConfig.model_type, LaspConfig, exist_ok=True)
AutoModelForCausalLM.register(LaspConfig, LaspForCausalLM, exist_ok=True)


def to_huggingface(decoder: Decoder, **kwargs: Any) -> LaspForCausalLM:
    """A Transformers model with the decoder's own tensors; kwargs are more fields of its configuration."""
    with torch.device("meta"):
        model = LaspForCausalLM(LaspConfig.of(decoder.config, **kwargs))
    model.decoder = decoder
    model.config.dtype = next(decoder.parameters()).dtype
    return model
