"""Model shapes by name, as fields of Megatron's TransformerConfig."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from lasp.config import ModelConfig
from lasp.models.presets import linear_llama3_1b, linear_llama3_8b


def _llama(shape: ModelConfig) -> dict[str, Any]:
    return {
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


def _moe(shape: ModelConfig, experts: int, top_k: int) -> dict[str, Any]:
    """Every MLP a mixture of experts of the size `intermediate_size`, balanced by a bias instead of a loss."""
    return _llama(shape) | {
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": shape.intermediate_size,
        "moe_router_topk": top_k,
        "moe_router_dtype": "fp32",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }


def tiny() -> dict[str, Any]:
    """For tests."""
    return _llama(ModelConfig(vocab_size=1, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64))


def tiny_moe() -> dict[str, Any]:
    """For tests."""
    shape = ModelConfig(vocab_size=1, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=32)
    return _moe(shape, experts=4, top_k=2)


def llama3_1b() -> dict[str, Any]:
    """Linear-Llama3-1B (arXiv:2502.07563)."""
    return _llama(linear_llama3_1b())


def llama3_8b() -> dict[str, Any]:
    """Llama-3-8B's shape (arXiv:2407.21783)."""
    return _llama(linear_llama3_8b())


def moe_a0_3b_2b() -> dict[str, Any]:
    """Linear-MoE A0.3B-2B (arXiv:2503.05447): 12 layers, 64 experts of which 8 see a token."""
    shape = ModelConfig(vocab_size=1, hidden_size=1024, num_layers=12, num_heads=8, intermediate_size=896)
    return _moe(shape, experts=64, top_k=8)


def moe_a1b_7b() -> dict[str, Any]:
    """Linear-MoE A1B-7B (arXiv:2503.05447): 16 layers, 64 experts of which 8 see a token."""
    shape = ModelConfig(vocab_size=1, hidden_size=2048, num_layers=16, num_heads=16, intermediate_size=1024)
    return _moe(shape, experts=64, top_k=8)


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    preset.__name__: preset for preset in (tiny, tiny_moe, llama3_1b, llama3_8b, moe_a0_3b_2b, moe_a1b_7b)
}
