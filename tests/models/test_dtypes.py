"""What a cast of the model leaves as it is."""

from dataclasses import replace

import pytest
import torch

from lasp.models import Decoder, tiny
from lasp.models.decays import ConstantDecay, lightning_decay, retention_decay
from lasp.models.moe.router import Router

CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "there and back": lambda module: module.bfloat16().double().to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("values", [retention_decay, lambda heads: lightning_decay(heads, 0.3)])
def test_constant_decays_are_not_rounded(cast, values):
    decay = ConstantDecay(6, values)
    decay.init_parameters(None)
    found, wanted = CASTS[cast](decay)(None), values(6)
    assert found.dtype == torch.float32 and ((found - wanted) / wanted).abs().max() < 1e-6


def test_nor_are_those_of_a_model_that_is_made_in_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Decoder(replace(tiny(), mixer="retention"))
    finally:
        torch.set_default_dtype(torch.float32)
    decays = [module for module in model.modules() if isinstance(module, ConstantDecay)]
    wanted = retention_decay(decays[0].log_decay.numel())
    assert ((decays[0](None) - wanted) / wanted).abs().max() < 1e-6
    assert model.layers[0].mixer.output.out_proj.weight.dtype == torch.bfloat16


def test_routers_biases_move_by_little_steps_in_a_model_of_bfloat16():
    router = Router(replace(tiny(), num_experts=4, experts_per_token=1, expert_bias_rate=1e-3))
    router.init_parameters(None)
    router.bias.fill_(1.0)
    router.bfloat16().move_bias(torch.tensor([1, 2, 3, 6]))
    assert router.proj.weight.dtype == torch.bfloat16
    assert torch.allclose(router.bias, torch.tensor([1.001, 1.001, 1.0, 0.999]), atol=1e-6)
