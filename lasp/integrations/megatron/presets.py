"""Model shapes by name, as fields of Megatron's TransformerConfig: those of `lasp.models.presets`, and smaller ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from lasp.config import ModelConfig
from lasp.models.presets import linear_llama3_1b, linear_llama3_8b, linear_moe_a0_3b_2b, linear_moe_a1b_7b

_TINY = ModelConfig(vocab_size=1, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64)


def _fields(shape: ModelConfig) -> dict[str, Any]:
    """A Llama's, or with every MLP a mixture of experts, balanced by a bias instead of a loss."""
    fields = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.key_dim,
        "ffn_hidden_size": shape.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_eps,
        "init_method_std": shape.init_std,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if shape.num_experts:
        fields |= {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.expert_size,
            "moe_router_topk": shape.experts_per_token,
            "moe_router_dtype": "fp32",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
    return fields


def tiny() -> dict[str, Any]:
    """For tests."""
    return _fields(_TINY)


def tiny_moe() -> dict[str, Any]:
    """For tests."""
    return _fields(replace(_TINY, intermediate_size=32, num_experts=4, experts_per_token=2))


def llama3_1b() -> dict[str, Any]:
    """Linear-Llama3-1B (arXiv:2502.07563)."""
    return _fields(linear_llama3_1b())


def llama3_8b() -> dict[str, Any]:
    """Llama-3-8B's shape (arXiv:2407.21783)."""
    return _fields(linear_llama3_8b())


def moe_a0_3b_2b() -> dict[str, Any]:
    """Linear-MoE A0.3B-2B (arXiv:2503.05447)."""
    return _fields(linear_moe_a0_3b_2b())


def moe_a1b_7b() -> dict[str, Any]:
    """Linear-MoE A1B-7B (arXiv:2503.05447)."""
    return _fields(linear_moe_a1b_7b())


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    preset.__name__: preset for preset in (tiny, tiny_moe, llama3_1b, llama3_8b, moe_a0_3b_2b, moe_a1b_7b)
}
