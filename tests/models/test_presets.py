"""Presets have the sizes that they claim, configurations refuse nonsense, and FLOPs follow their formula."""

from dataclasses import replace

import pytest

from lasp.config import MIXERS
from lasp.models import (
    PRESETS,
    count_active_parameters,
    count_parameters,
    flops_per_token,
    linear_llama3_1b,
    linear_llama3_8b,
    linear_moe_a0_3b_2b,
    linear_moe_a1b_7b,
    mini,
    tiny,
)


def test_llama_3_8b_has_the_published_number_of_parameters():
    assert count_parameters(linear_llama3_8b(pattern="N")) == 8_030_261_248


@pytest.mark.parametrize("pattern", ["L", "LLLN"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_linear_llama3_1b_is_about_1_3_billion(mixer, pattern):
    config = linear_llama3_1b(mixer, pattern)
    more = (config.steps - 1) * config.layers.count("L") * 2 * 2048**2  # k and v of further steps
    assert 1.25e9 < count_parameters(config) - more < 1.45e9


def test_linear_llama3_1b_by_hand():
    attention, mlp = 4 * 2048**2 + 128, 3 * 2048 * 8192
    expected = 128_256 * 2048 + 16 * (attention + mlp + 2 * 2048) + 2048
    assert count_parameters(linear_llama3_1b("linear", "L")) == expected


@pytest.mark.parametrize("pattern", ["L", "LLLN"])
@pytest.mark.parametrize("mixer", ["linear", "gated_delta_net"])
def test_linear_moe_sizes_are_those_of_their_names(mixer, pattern):
    """Without the embeddings, as the paper counts."""
    for preset, billions, active in ((linear_moe_a0_3b_2b, 2.17, 0.32), (linear_moe_a1b_7b, 6.75, 1.1)):
        config = preset(mixer, pattern)
        embeddings = 2 * config.vocab_size * config.hidden_size
        assert (count_parameters(config) - embeddings) / 1e9 == pytest.approx(billions, rel=0.01)
        assert (count_active_parameters(config) - embeddings) / 1e9 == pytest.approx(active, rel=0.05)


def test_linear_moe_by_hand():
    layer = 4 * 1024**2 + 128 + 64 * (3 * 1024 * 896 + 1024) + 2 * 1024
    assert count_parameters(linear_moe_a0_3b_2b("linear", "L")) == 12 * layer + 1024 + 2 * 151_936 * 1024


@pytest.mark.parametrize("mixer", MIXERS)
def test_small_presets(mixer):
    assert 30_000 < count_parameters(tiny(mixer)) < 80_000
    assert 0.7e6 < count_parameters(mini(mixer)) < 1.2e6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_mixer_and_pattern(name):
    config = PRESETS[name]("hgrn2", "LN")
    assert config.mixer == "hgrn2" and config.layers == "LN" * (config.num_layers // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "mambo"}, "mixer: got 'mambo'"),
        ({"pattern": "LX"}, "pattern: got 'LX'"),
        ({"pattern": ""}, "pattern: got ''"),
        ({"pattern": "LLN"}, "num_layers: got 4"),
        ({"num_kv_heads": 4}, "num_kv_heads: got 4"),
        ({"head_dim": 7}, "head_dim: got 7"),
        ({"head_dim": None, "num_heads": 3, "num_kv_heads": 3}, "hidden_size: got 32"),
        ({"vocab_size": -1}, "vocab_size: got -1"),
        ({"conv_width": 0}, "conv_width: got 0"),
    ],
)
def test_configurations_refuse_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        replace(tiny(), **change)


def test_flops_of_llama():
    """6 per parameter but the looked-up embedding, and 6 T H K per softmax layer (Q Kᵀ and P V, half masked)."""
    config = linear_llama3_8b(pattern="N")
    norms = 65 * 4096
    parameters = count_parameters(config) - 128_256 * 4096 - norms
    assert flops_per_token(config, 8192) == 6 * parameters + 32 * 6 * 8192 * 4096


def test_flops_of_linear_layers_do_not_grow_with_the_context():
    config = linear_llama3_1b("gla", "L")
    assert flops_per_token(config, 2048) == flops_per_token(config, 2**20)
    hybrid = linear_llama3_1b("gla", "LLLN")
    growth = flops_per_token(hybrid, 2**20) - flops_per_token(hybrid, 2048)
    assert growth == 4 * 6 * (2**20 - 2048) * 2048


def test_flops_of_states():
    """Three times (forward, and twice that backward) 4 K V per head, 6 K V where the delta rule erases."""

    def state_flops(mixer: str, matrices: int) -> float:
        config = linear_llama3_1b(mixer, "L")
        return flops_per_token(config, 1) - 6 * (128_256 * 2048 + 16 * (3 * 2048 * 8192 + matrices))

    assert state_flops("linear", 4 * 2048**2) == 16 * 16 * 3 * 4 * 128 * 128
    delta = 5 * 2048**2 + 2048 * 16 + 3 * 2048 * 4  # with gate, beta and convolution
    assert state_flops("delta_net", delta) == 16 * 16 * 3 * 6 * 128 * 128
    products = 7 * 2048**2 + 2048 * 16 * 3 + 5 * 2048 * 4  # two steps, with a decay
    assert state_flops("gated_delta_product", products) == 16 * 16 * 3 * (2 * 4 + 2) * 128 * 128
