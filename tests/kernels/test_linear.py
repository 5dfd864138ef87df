"""The chunk form of linear attention and the delta rule against the token-by-token form, on one device."""

import pytest
import torch
from torch import Tensor

from lasp.kernels import delta_rule, linear_attention
from lasp.kernels.reference.recurrent import recurrent
from tests.parallel.inputs import error

F64 = torch.float64
FP32_SUMS = 2e-6  # what sums over a chunk lose in fp32
DECAYS = ("none", "constant", "scalar", "diagonal")
FAMILIES = [(decay, delta, True) for decay in DECAYS for delta in (False, True)] + [("none", False, False)]
NAMES = [f"{d}{' delta' if b else ''}{'' if c else ' not causal'}" for d, b, c in FAMILIES]


def inputs(gen: torch.Generator, decay: str, delta: bool, tokens: int, batch: int = 1, strength: float = 0.1):
    """q, k, v, decay, beta with two q/k heads, four value heads, K = 8, V = 6."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=F64)

    q, k = (torch.randn(batch, tokens, 2, 8, generator=gen, dtype=F64) for _ in range(2))
    v = torch.randn(batch, tokens, 4, 6, generator=gen, dtype=F64)
    rows = batch, tokens, 4
    shape = {"constant": (4,), "scalar": rows, "diagonal": (*rows, 8)}.get(decay)
    g = None if shape is None else -uniform(*shape) * strength
    return q, k / k.norm(dim=-1, keepdim=True), v, g, uniform(*rows) if delta else None


def call(q, k, v, decay, beta, **options):
    if beta is not None:
        options.pop("causal", None)
        return delta_rule(q, k, v, beta, decay, **options)
    return linear_attention(q, k, v, decay, **options)


def both(gen, decay, delta, causal, tokens, offsets=None, batch=1, scale=None, strength=0.1) -> dict[str, float]:
    """The errors of the outputs, the final state and every gradient, relative by norm."""
    q, k, v, g, beta = inputs(gen, decay, delta, tokens, batch, strength)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    count = batch if offsets is None else len(offsets) - 1
    state = torch.randn(count, 4, 8, 6, generator=gen, dtype=F64)
    named = {"q": q, "k": k, "v": v, "decay": g if g is not None and g.ndim > 1 else None, "beta": beta, "state": state}
    leaves = {name: x.requires_grad_() for name, x in named.items() if x is not None}
    options = {"scale": scale, "causal": causal, "initial_state": state, "cu_seqlens": cu_seqlens}
    wanted = recurrent(q, k, v, g, beta, **options)
    got = call(q, k, v, g, beta, output_final_state=True, **options)
    upstream = [torch.randn(x.shape, generator=gen, dtype=F64) for x in wanted]
    wanted = [*wanted, *torch.autograd.grad(wanted, list(leaves.values()), upstream)]
    got = [*got, *torch.autograd.grad(got, list(leaves.values()), upstream)]
    names = ["o", "final_state", *(f"d{name}" for name in leaves)]
    return {name: error(a, b) for name, a, b in zip(names, got, wanted, strict=True)}


@pytest.mark.parametrize(("decay", "delta", "causal"), FAMILIES, ids=NAMES)
def test_equals_the_recurrent_form(gen, decay, delta, causal):
    for tokens in (1, 63, 130):
        found = both(gen, decay, delta, causal, tokens, batch=2)
        assert max(found.values()) < 1e-10, (tokens, found)


@pytest.mark.parametrize(("decay", "delta", "causal"), FAMILIES, ids=NAMES)
def test_packed_documents(gen, decay, delta, causal):
    found = both(gen, decay, delta, causal, 150, offsets=[0, 1, 1, 70, 134, 150], scale=0.7)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("delta", [False, True], ids=["", "delta"])
@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
@pytest.mark.parametrize("strength", [0.0, 100.0], ids=["open gate", "closing gate"])
def test_gates_that_do_nothing_or_close(gen, decay, delta, strength):
    """g = 0 everywhere, and g down to -100: finite and right, gradients too."""
    found = both(gen, decay, delta, True, 130, strength=strength)
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("decay", "delta", "causal"), FAMILIES, ids=NAMES)
def test_lower_precision_loses_no_more_than_rounding_its_inputs(gen, dtype, decay, delta, causal):
    """States accumulate in fp32, so that the error is that of rounding inputs and outputs to the dtype."""
    exact = [x if x is None else x.to(dtype).double() for x in inputs(gen, decay, delta, 130)]
    rounded = [x if x is None else x.to(dtype) for x in exact]
    o, state = call(*rounded, causal=causal, output_final_state=True)
    wanted, wanted_state = recurrent(*exact, causal=causal)
    assert o.dtype == dtype and state.dtype == torch.float32
    assert error(o.double(), wanted) < 2 * torch.finfo(dtype).eps + FP32_SUMS
    assert error(state.double(), wanted_state) < FP32_SUMS


def test_final_state_continues_the_sequence(gen):
    for decay, delta, _ in FAMILIES[:-1]:
        q, k, v, g, beta = inputs(gen, decay, delta, 100)
        whole, _ = call(q, k, v, g, beta)
        state, parts = None, []
        for rows in (slice(0, 33), slice(33, 34), slice(34, 100)):
            gate = g if g is None or g.ndim == 1 else g[:, rows]
            part, state = call(
                q[:, rows], k[:, rows], v[:, rows], gate, None if beta is None else beta[:, rows],
                initial_state=state, output_final_state=True,
            )  # fmt: skip
            parts.append(part)
        assert error(torch.cat(parts, 1), whole) < 1e-10


def test_final_state_is_none_unless_asked_for(gen):
    q, k, v, g, _ = inputs(gen, "scalar", False, 5)
    assert linear_attention(q, k, v, g)[1] is None


def refusals():
    def rows(*shape: int, dtype=F64) -> Tensor:
        return torch.zeros(1, 5, *shape, dtype=dtype)

    q, v = rows(2, 8), rows(4, 6)
    cu = torch.tensor([0, 5])
    yield "4: \\[B, T, heads", lambda: linear_attention(q[0], q[0], v[0])
    yield "k: got shape", lambda: linear_attention(q, rows(2, 7), v)
    yield "v: got shape", lambda: linear_attention(q, q, torch.zeros(1, 6, 4, 6, dtype=F64))
    yield "at least one token", lambda: linear_attention(q[:, :0], q[:, :0], v[:, :0])
    yield "a multiple of q's 2", lambda: linear_attention(q, q, rows(3, 6))
    yield "dtype", lambda: linear_attention(q, q, v.float())
    yield "dtype", lambda: linear_attention(q.long(), q.long(), v.long())
    yield (
        "constant decay \\[H\\] that requires grad",
        lambda: linear_attention(q, q, v, v.new_zeros(4).requires_grad_()),
    )
    yield "decay.*\\[H\\]", lambda: linear_attention(q, q, v, v.new_zeros(3))
    yield "decay", lambda: linear_attention(q, q, v, rows(4, 7))
    yield "at most 0", lambda: linear_attention(q, q, v, rows(4) + 0.1)
    yield "decay: got NaN, expected natural log", lambda: linear_attention(q, q, v, rows(4) * torch.nan)
    yield "None with causal=False", lambda: linear_attention(q, q, v, rows(4), causal=False)
    yield "initial_state", lambda: linear_attention(q, q, v, initial_state=torch.zeros(1, 4, 6, 8, dtype=F64))
    yield "initial_state.*float32", lambda: linear_attention(q, q, v, initial_state=torch.zeros(1, 4, 8, 6))
    yield "int32 or int64", lambda: linear_attention(q, q, v, cu_seqlens=cu.float())
    yield "an end at 4", lambda: linear_attention(q, q, v, cu_seqlens=torch.tensor([0, 4]))
    yield "a start at 1", lambda: linear_attention(q, q, v, cu_seqlens=torch.tensor([1, 5]))
    yield "do not decrease", lambda: linear_attention(q, q, v, cu_seqlens=torch.tensor([0, 4, 3, 5]))
    yield "B = 1", lambda: linear_attention(*(x.expand(2, -1, -1, -1) for x in (q, q, v)), cu_seqlens=cu)
    yield "backend", lambda: linear_attention(q, q, v, backend="cuda")
    yield "beta", lambda: delta_rule(q, q, v, rows(2))


@pytest.mark.parametrize(("message", "refused"), list(refusals()))
def test_bad_input_is_named(message, refused):
    with pytest.raises(ValueError, match=message):
        refused()


@pytest.mark.parametrize("shape", [(1, 90, 2), (1, 90, 2, 16)], ids=["scalar", "diagonal"])
def test_the_gradient_of_gates_that_are_nearly_closed(gen, shape):
    """It is 1e-22 times as large as what a token reads of itself."""
    q, k, v, do = (torch.randn(1, 90, 2, 16, generator=gen, dtype=torch.float64) for _ in range(4))

    def gradient(form):
        gates = torch.full(shape, -50.0, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(form(q, k, v, gates)[0], gates, do)[0]

    assert error(gradient(linear_attention), gradient(recurrent)) < 1e-10
