"""The models: local tensors only; what crosses the sequence goes through the `seq` passed to forward."""

from lasp.models.decoder import Decoder, make_model
from lasp.models.flops import count_active_parameters, count_parameters, flops_per_token
from lasp.models.loss import linear_cross_entropy
from lasp.models.memory import Memory, Rows
from lasp.models.presets import (
    PRESETS,
    linear_llama3_1b,
    linear_llama3_8b,
    linear_moe_a0_3b_2b,
    linear_moe_a1b_7b,
    mini,
    tiny,
)
from lasp.models.sequence import SequenceOps

__all__ = [
    "PRESETS",
    "Decoder",
    "Memory",
    "Rows",
    "SequenceOps",
    "count_active_parameters",
    "count_parameters",
    "flops_per_token",
    "linear_cross_entropy",
    "linear_llama3_1b",
    "linear_llama3_8b",
    "linear_moe_a0_3b_2b",
    "linear_moe_a1b_7b",
    "make_model",
    "mini",
    "tiny",
]
