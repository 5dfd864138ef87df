import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lasp.config import OptimizerConfig
from lasp.training.engine import make_engine
from lasp.training.optimizer import (
    build_optimizer,
    clip_gradients,
    divide_in_step,
    excess,
    gradients_of,
    learning_rate,
    norm_of,
    set_learning_rate,
)
from lasp.training.runtime import join_world

STEPS = 100


def rates(**fields):
    config = OptimizerConfig(lr=2.0, warmup_steps=10, min_ratio=0.1, **fields)
    return [learning_rate(config, step, STEPS) for step in range(STEPS)]


def test_warmup_is_linear_and_ends_at_lr():
    for schedule in ("cosine", "wsd"):
        got = rates(schedule=schedule)
        assert got[:11] == pytest.approx([2.0 * (s + 1) / 11 for s in range(11)])


def test_cosine_follows_its_equation():
    got = rates(schedule="cosine")
    for step in (10, 37, 55, 99):
        u = (step - 10) / 90
        assert got[step] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * u)) / 2))
    assert got[10:] == sorted(got[10:], reverse=True)
    assert got[-1] == pytest.approx(0.2, rel=0.01)


def test_wsd_is_stable_and_then_decays_linearly():
    got = rates(schedule="wsd", decay_fraction=0.25)
    assert got[10:76] == pytest.approx([2.0] * 66)
    assert got[75:] == pytest.approx([2.0 * (0.1 + 0.9 * (1 - i / 25)) for i in range(25)])


def test_wsd_decay_never_overlaps_the_warmup():
    config = OptimizerConfig(lr=1.0, warmup_steps=50, schedule="wsd", decay_fraction=1.0, min_ratio=0.0)
    got = [learning_rate(config, step, STEPS) for step in range(STEPS)]
    assert max(got) == got[50] == 1.0
    assert got[75] == pytest.approx(0.5)


def test_a_run_shorter_than_its_warmup_only_rises():
    config = OptimizerConfig(lr=1.0, warmup_steps=19, schedule="wsd")
    assert [learning_rate(config, step, 4) for step in range(4)] == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_no_warmup_begins_at_lr():
    assert learning_rate(OptimizerConfig(lr=0.5, warmup_steps=0), 0, STEPS) == 0.5


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3))
    decays = {}
    for group in build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups:
        decays |= {id(p): group["weight_decay"] for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
    }


def test_learning_rate_reaches_every_group():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_clipping_scales_to_the_norm_over_all_parameters():
    model = nn.Linear(3, 2).double()
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert clip_gradients(model, 0.5).item() == pytest.approx(before.norm().item())
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-5, atol=0)


def test_small_gradients_are_left_alone():
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = torch.full_like(model.weight, 0.1)
    clip_gradients(model, 10.0)
    assert (model.weight.grad == 0.1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_left_as_they_are(bad):
    """The loop then leaves out the step or ends the run: tests/training/test_numerics.py."""
    model = nn.Linear(3, 2, bias=False)
    model.weight.grad = torch.full_like(model.weight, 7.0)
    model.weight.grad[0, 0] = bad
    assert not math.isfinite(clip_gradients(model, 1.0))
    assert (model.weight.grad == 7.0).sum() == 5


class Passes(TorchDispatchMode):
    """The operations that read or write tensors of `numel` elements, one for each list of them."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.numel() == self.numel for x in tensors) and "detach" not in str(function):
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_step_reads_gradients_twice(config, fsdp, scale):
    """For their norm, and to update the weights; whether they are clipped or not."""
    config = replace(config, dtype="float32", parallel=replace(config.parallel, fsdp=fsdp))
    with join_world(config) as world:
        engine = make_engine(config, world)
        weight = engine.model.embedding.weight
        passes = Passes((weight.to_local() if fsdp else weight).numel())
        for within in (nullcontext(), passes):  # the first step makes the optimiser's states
            for parameter in engine.model.parameters():
                parameter.grad = torch.full_like(parameter, scale)
            with within:
                engine.step(1e-3, torch.tensor(1.0))
    assert passes.seen == ["_foreach_norm", "_fused_adamw_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.1, 1e3, math.inf])
def test_gradients_that_are_divided_in_the_step_give_what_clipped_ones_give(gen, dtype, max_norm):
    ways = []
    for _ in range(2):
        torch.manual_seed(3)
        model = nn.Linear(30, 20).to(dtype)
        ways.append((model, build_optimizer(model, OptimizerConfig(lr=0.1))))
    (clipped, first), (divided, second) = ways
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=gen, dtype=dtype) for p in clipped.parameters()]
        for model in (clipped, divided):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
        norm = clip_gradients(clipped, max_norm)
        together = gradients_of(divided)
        assert norm_of(together) == norm
        divide_in_step(second, together, excess(norm, max_norm))
        first.step()
        second.step()
    tolerance = 0 if max_norm > norm else 1e-6 if dtype == torch.float32 else 1e-14
    for one, other in zip(clipped.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def test_gradients_of_several_dtypes_are_divided_alike():
    """The optimiser takes the divisor in float32; what that leaves of it is for those in float64, wherever they are."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1).double())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer, together = build_optimizer(model, OptimizerConfig()), gradients_of(model)
    assert norm_of(together).item() == pytest.approx(math.sqrt(11))
    divisor = torch.tensor(1.1, dtype=torch.float64)
    divide_in_step(optimizer, together, divisor)
    first, second = (layer.weight.grad[0, 0] / optimizer.grad_scale for layer in model)
    assert first == 1 / optimizer.grad_scale and second.item() == pytest.approx(1 / 1.1, rel=1e-15)
