"""Single-device ops, with flash-linear-attention's conventions: `[B, T, H, D]` tensors, fp32 states, log decays."""

from lasp.kernels.conv import causal_conv1d, short_conv
from lasp.kernels.delta_product import delta_product
from lasp.kernels.linear import delta_rule, linear_attention
from lasp.kernels.log_linear import log_linear_attention, log_linear_delta_rule
from lasp.kernels.softmax import softmax_attention

__all__ = [
    "causal_conv1d",
    "delta_product",
    "delta_rule",
    "linear_attention",
    "log_linear_attention",
    "log_linear_delta_rule",
    "short_conv",
    "softmax_attention",
]
