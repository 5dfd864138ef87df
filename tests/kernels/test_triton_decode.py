"""The step for a single token against the token-by-token form in float64, through the public functions."""

import pytest
import torch
from torch import Tensor

from lasp.kernels import delta_rule, linear_attention
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.triton import dispatch
from tests.parallel.inputs import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECAYS = ("none", "constant", "scalar", "diagonal")


def draw(gen, decay: str, batch: int, q_heads: int, heads: int, k: int, v: int, strength: float = 1.0):
    """q, k, v, decay and beta of one token; keys of unit length, for longer ones make errors grow, and queries that
    are not orthogonal to them, for a product near 0 has no relative error."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(DEVICE)

    rows = batch, 1, heads
    sizes = {"constant": (heads,), "scalar": rows, "diagonal": (*rows, k)}
    g = -strength * torch.rand(sizes[decay], generator=gen).to(DEVICE) if decay in sizes else None
    beta = 2 * torch.rand(rows, generator=gen).to(DEVICE)
    key = normal(batch, 1, q_heads, k)
    key = key / key.norm(dim=-1, keepdim=True)
    return 4 * key + normal(batch, 1, q_heads, k), key, normal(batch, 1, heads, v), g, beta


def both(q, k, v, g, beta, state, delta: bool):
    """o and the state after the token: by the step, and by the definition."""
    options = {"scale": 0.7, "initial_state": state, "output_final_state": True, "backend": "triton"}
    found = delta_rule(q, k, v, beta, g, **options) if delta else linear_attention(q, k, v, g, **options)
    exact = [None if x is None else x.double() for x in (q, k, v, g, beta if delta else None)]
    return found, recurrent(*exact, scale=0.7, initial_state=None if state is None else state.double())


@pytest.fixture(autouse=True)
def step_alone(monkeypatch):
    """What is not the step fails; what it does not write is not a number."""

    def refuse(*_, **__):
        raise AssertionError("not the step")

    def poisoned(make):
        return lambda *args, **options: make(*args, **options).fill_(torch.nan)

    monkeypatch.setattr(dispatch, "triton_op", refuse)
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("q_heads", "k", "v"), [(1, 16, 72), (3, 24, 16)])
def test_equals_the_definition(gen, decay, delta, q_heads, k, v):
    tensors = draw(gen, decay, 2, q_heads, 3, k, v)
    state = torch.randn(2, 3, k, v, generator=gen).to(DEVICE)
    before = state.clone()
    for given in (state, None):
        found, wanted = both(*tensors, given, delta)
        assert max(error(x.double(), y) for x, y in zip(found, wanted, strict=True)) < 1e-6
    assert torch.equal(state, before)


def test_token_by_token_equals_the_whole(gen):
    """A closed gate in between, states handed on."""
    steps = [draw(gen, "diagonal", 1, 1, 2, 16, 16, strength) for strength in (0.0, 0.5, 50.0, 0.5)]
    state, outputs = None, []
    for step in steps:
        (o, state), _ = both(*step, state, True)
        outputs.append(o)
    q, k, v, g, beta = (torch.cat(parts, dim=1).double() for parts in zip(*steps, strict=True))
    wanted = recurrent(q, k, v, g, beta, scale=0.7)
    assert error(torch.cat(outputs, dim=1).double(), wanted[0]) < 1e-6
    assert error(state.double(), wanted[1]) < 1e-6


def test_half_precision_rounds_the_output_alone(gen):
    q, k, v, g, beta = draw(gen, "scalar", 1, 1, 2, 16, 32)
    state = torch.randn(1, 2, 16, 32, generator=gen).to(DEVICE)
    found, wanted = both(q.half(), k.half(), v.half(), g, beta, state, True)
    assert found[0].dtype == torch.float16
    assert found[1].dtype == torch.float32
    assert error(found[0].double(), wanted[0]) < 1e-3
    assert error(found[1].double(), wanted[1]) < 1e-6


def test_a_gradient_or_several_tokens_are_not_the_step(gen):
    q, k, v, g, _ = draw(gen, "scalar", 1, 1, 1, 16, 16)
    two = [x.repeat(1, 2, *[1] * (x.ndim - 2)) for x in (q, k, v)]
    for call in (
        lambda: linear_attention(q.requires_grad_(), k, v, g, backend="triton"),
        lambda: linear_attention(*two, backend="triton"),
    ):
        with pytest.raises(AssertionError, match="not the step"):
            call()
