"""The loss of Megatron's language models without their logits, which for long contexts are larger than all else."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from lasp.config import require
from lasp.models.loss import IGNORE, linear_cross_entropy


@cache
def summing(model: type) -> Any:
    """GPTModel or HybridModel as a class whose models, given labels [b, s], return the sum of their losses.

    Labels of -100 count for nothing. Without tensor parallelism the logits never exist whole; with it, every rank has
    those of its part of the vocabulary. Without labels nothing changes.
    """

    class SummingModel(model):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            require(not config.mtp_num_layers, "mtp_num_layers", config.mtp_num_layers, "None")
            require(not getattr(config, "use_mup", False), "use_mup", True, "False")

        def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
            if labels is None or not self.post_process:
                return super().forward(*args, labels=labels, **kwargs)
            if self.tp_group.size() > 1:
                losses = super().forward(*args, labels=labels.clamp(min=0), **kwargs)
                return (losses.float() * (labels != IGNORE)).sum()
            with _identity(self.output_layer):
                hidden = super().forward(*args, **kwargs)  # [b, s, h]
            shared = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
            return linear_cross_entropy(hidden, weight, labels)[0]

    SummingModel.__name__ = f"Summing{model.__name__}"
    return SummingModel


@contextmanager
def _identity(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer hands its input on."""
    layer.forward = lambda x, **kwargs: (x, None)
    try:
        yield
    finally:
        del layer.forward
