import math

import pytest
import torch
from torch import nn

from lasp.config import OptimizerConfig
from lasp.training.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate

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
