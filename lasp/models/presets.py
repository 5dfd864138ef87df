"""Model shapes by name. Mixer and pattern are the caller's choice; `dataclasses.replace` changes anything else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lasp.config import ModelConfig

_MIXER, _PATTERN = "gated_delta_net", "LLLN"


def _decoder(
    mixer: str, pattern: str, *, vocabulary: int, hidden: int, layers: int, heads: int, mlp: int, **more: Any
) -> ModelConfig:
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp}
    return ModelConfig(**sizes, num_layers=layers, num_heads=heads, mixer=mixer, pattern=pattern, **more)


def tiny(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """About 50 thousand parameters, grouped keys and values, a value size of its own: for tests."""
    more = {"head_dim": 8, "value_head_dim": 16, "num_kv_heads": 1}
    return _decoder(mixer, pattern, vocabulary=64, hidden=32, layers=4, heads=2, mlp=64, **more)


def mini(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """About 0.9 million parameters over bytes: trains on a laptop's CPU."""
    return _decoder(mixer, pattern, vocabulary=260, hidden=128, layers=4, heads=4, mlp=384)


def linear_llama3_1b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-Llama3-1B of LASP-2 (arXiv:2502.07563): 16 layers, 16 heads of 128, tied embeddings."""
    return _decoder(mixer, pattern, vocabulary=128_256, hidden=2048, layers=16, heads=16, mlp=8192)


def linear_llama3_8b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Llama-3-8B's shape (arXiv:2407.21783); with pattern "N" it is Llama 3."""
    more = {"num_kv_heads": 8, "tie_embeddings": False}
    return _decoder(mixer, pattern, vocabulary=128_256, hidden=4096, layers=32, heads=32, mlp=14_336, **more)


def linear_moe_a0_3b_2b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-MoE A0.3B-2B (arXiv:2503.05447): 2.2 billion parameters without the embeddings, 0.3 of them active."""
    more = {"rope_theta": 10_000.0, "tie_embeddings": False, "num_experts": 64, "experts_per_token": 8}
    return _decoder(mixer, pattern, vocabulary=151_936, hidden=1024, layers=12, heads=8, mlp=896, **more)


def linear_moe_a1b_7b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-MoE A1B-7B (arXiv:2503.05447): 6.7 billion parameters without the embeddings, 1.1 of them active."""
    smaller = linear_moe_a0_3b_2b(mixer, pattern)
    return replace(smaller, hidden_size=2048, num_layers=16, num_heads=16, intermediate_size=1024)


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    preset.__name__: preset
    for preset in (tiny, mini, linear_llama3_1b, linear_llama3_8b, linear_moe_a0_3b_2b, linear_moe_a1b_7b)
}
