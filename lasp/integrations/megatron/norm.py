"""The norms of local layers, where neither Apex nor TransformerEngine brings one."""

from typing import Any

from torch import nn

from lasp.config import require
from lasp.models.layers import RMSNorm

_NORMS = {"RMSNorm": RMSNorm, "LayerNorm": nn.LayerNorm}


class Norm:
    """`config.normalization` over the last dimension, also with Megatron's sequence parallelism.

    There a rank sees a part of the tokens only: the mark on the weights tells Megatron to sum their gradients over the
    tensor-parallel group.
    """

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        require(config.normalization in _NORMS, "normalization", config.normalization, " or ".join(_NORMS))
        zero_centered = config.layernorm_zero_centered_gamma
        require(not zero_centered, "layernorm_zero_centered_gamma", zero_centered, "False")
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
