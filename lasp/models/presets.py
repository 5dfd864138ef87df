"""Model shapes by name. Mixer and pattern are the caller's choice; `dataclasses.replace` changes anything else."""

from collections.abc import Callable
from dataclasses import replace

from lasp.config import ModelConfig

_MIXER, _PATTERN = "gated_delta_net", "LLLN"


def tiny(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """About 50 thousand parameters, grouped keys and values, a value size of its own: for tests."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        num_heads=2,
        head_dim=8,
        value_head_dim=16,
        num_kv_heads=1,
        intermediate_size=64,
        mixer=mixer,
        pattern=pattern,
    )


def mini(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """About 0.9 million parameters over bytes: trains on a laptop's CPU."""
    return ModelConfig(
        vocab_size=260,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        intermediate_size=384,
        mixer=mixer,
        pattern=pattern,
    )


def linear_llama3_1b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-Llama3-1B of LASP-2 (arXiv:2502.07563): 16 layers, 16 heads of 128, tied embeddings."""
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=2048,
        num_layers=16,
        num_heads=16,
        intermediate_size=8192,
        mixer=mixer,
        pattern=pattern,
    )


def linear_llama3_8b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Llama-3-8B's shape (arXiv:2407.21783); with pattern "N" it is Llama 3."""
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14_336,
        tie_embeddings=False,
        mixer=mixer,
        pattern=pattern,
    )


def linear_moe_a0_3b_2b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-MoE A0.3B-2B (arXiv:2503.05447): 2.2 billion parameters without the embeddings, 0.3 of them active."""
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=1024,
        num_layers=12,
        num_heads=8,
        intermediate_size=896,
        rope_theta=10_000.0,
        tie_embeddings=False,
        num_experts=64,
        experts_per_token=8,
        mixer=mixer,
        pattern=pattern,
    )


def linear_moe_a1b_7b(mixer: str = _MIXER, pattern: str = _PATTERN) -> ModelConfig:
    """Linear-MoE A1B-7B (arXiv:2503.05447): 6.7 billion parameters without the embeddings, 1.1 of them active."""
    smaller = linear_moe_a0_3b_2b(mixer, pattern)
    return replace(smaller, hidden_size=2048, num_layers=16, num_heads=16, intermediate_size=1024)


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    preset.__name__: preset
    for preset in (tiny, mini, linear_llama3_1b, linear_llama3_8b, linear_moe_a0_3b_2b, linear_moe_a1b_7b)
}
