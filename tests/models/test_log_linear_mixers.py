"""Log-linear mixers against the plain ones, and against the dense definition of what they add."""

import pytest
import torch

from lasp.kernels import log_linear_attention, log_linear_delta_rule
from lasp.models import tiny
from lasp.models.mixers import make_mixer
from lasp.models.mixers.log_linear import LEVELS, LogLinearDeltaMixer, LogLinearMamba2Mixer
from tests.kernels.log_linear import dense
from tests.models.helpers import sequence

T = 11
MIXERS = {"mamba2": LogLinearMamba2Mixer, "gated_delta_net": LogLinearDeltaMixer}


class Leveled:
    """One rank's sequence, with log-linear attention of some kind."""

    def __init__(self, attention, delta_rule):
        self.log_linear_attention, self.log_linear_delta_rule = attention, delta_rule
        self.seq = sequence(T)

    def __getattr__(self, name):
        return getattr(self.seq, name)


def made(plain: str):
    """The mixer, and its plain relative with the same weights."""
    config = tiny(plain, "L")
    mixer, relative = MIXERS[plain](config, 0).double(), make_mixer(config, 0).double()
    with torch.no_grad():
        for module in mixer.modules():
            if hasattr(module, "init_parameters"):
                module.init_parameters(None)
    relative.load_state_dict({n: p for n, p in mixer.state_dict().items() if not n.startswith("level_scales")})
    return mixer, relative


@pytest.mark.parametrize("plain", MIXERS)
def test_is_the_plain_mixer_where_all_levels_weigh_the_same(plain):
    mixer, relative = made(plain)
    torch.nn.init.zeros_(mixer.level_scales.proj.weight)
    x = torch.randn(2, T, tiny(plain, "L").hidden_size, dtype=torch.float64)
    found = mixer(x, Leveled(log_linear_attention, log_linear_delta_rule))
    torch.testing.assert_close(found, relative(x, sequence(T)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("plain", MIXERS)
def test_weighs_levels_by_what_is_computed_from_the_token(plain):
    mixer, relative = made(plain)
    for model in (mixer, relative):  # what goes past Mamba-2's state outweighs it
        torch.nn.init.zeros_(getattr(model, "D", torch.empty(0)))
    x = torch.randn(1, T, tiny(plain, "L").hidden_size, dtype=torch.float64)
    scales = (x @ mixer.level_scales.proj.weight.mT + mixer.level_scales.bias).exp().add(1).log()
    scales = scales.view(1, T, -1, LEVELS)
    of_dense = Leveled(
        lambda q, k, v, decay, given, scale: dense(q, k, v, decay, scales, scale=scale),
        lambda q, k, v, beta, decay, given, scale: dense(q, k, v, decay, scales, beta, scale=scale),
    )
    found = mixer(x, Leveled(log_linear_attention, log_linear_delta_rule))
    torch.testing.assert_close(found, mixer(x, of_dense), rtol=1e-10, atol=1e-12)
    assert (found - relative(x, sequence(T))).norm() > 0.01 * found.norm()
    gradient = torch.autograd.grad(found.sum(), mixer.level_scales.proj.weight)[0]
    assert gradient.abs().max() > 0
