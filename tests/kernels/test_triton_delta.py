"""The delta rule's Triton kernels against the token-by-token form in float64: on a GPU, else interpreted."""

import pytest
import torch
from torch import Tensor

from lasp.kernels import delta_rule
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Alone, run
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from lasp.kernels.triton.delta import backend
from lasp.kernels.triton.delta import op as delta
from lasp.kernels.triton.device import cdiv
from tests.kernels.boundary import Asked
from tests.parallel.inputs import error, inputs_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DECAYS = ("none", "constant", "scalar", "diagonal")
EXACT = 5e-6  # fp32 products and sums over a chunk


def inputs(gen, decay: str, shape: tuple[int, ...], strength: float, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """q, k, v, decay, beta and the initial state; shape = (B, T, Hq, H, K, V, N)."""
    batch, tokens, q_heads, heads, key_dim, value_dim, count = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=gen)

    q, k = normal(batch, tokens, q_heads, key_dim), normal(batch, tokens, q_heads, key_dim)
    tokens_heads = batch, tokens, heads
    sizes = {"constant": (heads,), "scalar": tokens_heads, "diagonal": (*tokens_heads, key_dim)}
    g = uniform(*sizes[decay]) if decay in sizes else None
    beta = 2 * uniform(*tokens_heads)
    beta[:, ::7] = 0  # tokens that write nothing still have a gradient of beta
    tensors = {
        "q": q,
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": normal(batch, tokens, heads, value_dim),
        "decay": None if g is None else -strength * g,
        "beta": beta,
    }
    rounded = {name: None if x is None else x.to(DEVICE, dtype) for name, x in tensors.items()}
    return rounded | {"state": normal(count, heads, key_dim, value_dim).to(DEVICE)}


def errors(
    gen, decay: str, shape, offsets=None, strength: float = 0.1, dtype=torch.float32, state=True, boundary=Alone
):
    """The relative errors, by norm, of the outputs, the final state and every gradient."""
    batch, tokens = shape[:2]
    given = inputs(gen, decay, (*shape, batch if offsets is None else len(offsets) - 1), strength, dtype)
    if not state:
        given["state"] = None
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    upstream: list[Tensor] = []

    def results(op, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        leaves = {n: x.requires_grad_() for n, x in tensors.items() if x is not None and x.ndim > 1}
        found = op(**tensors)
        if not upstream:
            upstream.extend(torch.randn(x.shape, generator=gen).to(DEVICE, dtype) for x in found)
        grads = torch.autograd.grad(
            found, list(leaves.values()), [d.to(x.dtype) for d, x in zip(upstream, found, strict=True)]
        )
        return dict(zip(["o", "final_state", *leaves], [*found, *grads], strict=True))

    def kernels(q, k, v, decay, beta, state):
        return run(
            delta.TritonDelta(),
            boundary(),
            inputs_of(q, k, v, decay, beta, 0.3, Segments(batch, tokens, cu_seqlens)),
            state,
            True,
        )

    def definition(q, k, v, decay, beta, state):
        return recurrent(q, k, v, decay, beta, scale=0.3, initial_state=state, cu_seqlens=cu_seqlens)

    exact = {n: None if x is None else x.detach().double() for n, x in given.items()}
    got, wanted = results(kernels, given), results(definition, exact)
    return {name: error(got[name].double(), wanted[name]) for name in wanted}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is not a number."""

    def poison(make):
        def made(*args, **options):
            x = make(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(params=[False, True], ids=["tiles", "whole segments"])
def whole(request, monkeypatch):
    """Either tiles of 64 tokens with transitions, or scans over whole segments."""
    monkeypatch.setattr(delta, "ENOUGH_SCANS", 1 if request.param else 10**9)
    monkeypatch.setattr(delta, "SHORTEST_TILE", 64)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 64)


@pytest.mark.parametrize("decay", DECAYS)
def test_equals_the_recurrent_form(gen, whole, decay):
    found = errors(gen, decay, (1, 150, 1, 2, 40, 16))
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_short_sequences_and_batches(gen, whole, decay, tokens):
    found = errors(gen, decay, (2, tokens, 1, 1, 32, 16), state=False)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_nothing_enters_and_nobody_asks_for_what_leaves(gen, whole, decay):
    given = inputs(gen, decay, (2, 130, 1, 1, 32, 16, 2), 0.1, torch.float32)
    tensors = [given[name] for name in ("q", "k", "v", "beta", "decay")]
    do = torch.randn(given["v"].shape, generator=gen).to(DEVICE)

    def results(backend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        o, final = delta_rule(*leaves, backend=backend)
        assert final is None
        return [o, *torch.autograd.grad(o, leaves, do.to(dtype))]

    pairs = zip(results("triton", torch.float32), results("reference", torch.float64), strict=True)
    assert max(error(x.double(), y) for x, y in pairs) < EXACT


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_packed_documents(gen, whole, decay):
    found = errors(gen, decay, (1, 150, 1, 1, 32, 16), offsets=[0, 1, 1, 140, 150])
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize(("at_once", "most_rounded"), [(2, 4), (1, 4), (1, 1)], ids=["apart", "summed", "in fp32"])
@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_heads_in_groups_and_in_parts(gen, whole, decay, at_once, most_rounded, monkeypatch):
    """Gradients of a group's q and k are summed as its heads come, here one or two at a time."""
    monkeypatch.setattr(delta, "HEADS_AT_ONCE", at_once)
    monkeypatch.setattr(delta, "TOKENS_AT_ONCE", 0)
    monkeypatch.setattr(backend, "MOST_ROUNDED", most_rounded)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 1)
    found = errors(gen, decay, (1, 70, 2, 6, 24, 40))
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("strength", [0.0, 1.5, 50.0], ids=["open gate", "steep gate", "closing gate"])
@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_gates_that_do_nothing_or_close(gen, whole, decay, strength):
    """Of a closed vector gate the gradient is a small difference of large numbers: what fp32 leaves of it."""
    found = errors(gen, decay, (1, 130, 1, 1, 32, 16), strength=strength)
    closing = {"scalar": 2e-6 if DEVICE.type == "cpu" else EXACT, "diagonal": 1e-3}
    assert found.pop("decay") < (closing[decay] if strength > 0 else EXACT)
    assert max(found.values()) < 4 * EXACT, found


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_half_precision_loses_no_more_than_rounding(gen, whole, decay):
    found = errors(gen, decay, (1, 70, 1, 1, 32, 16), dtype=torch.float16)
    assert max(found.values()) < 2e-3, found


def test_equal_keys_do_not_lose_precision(gen, whole, monkeypatch):
    """Powers of L grow like binomials here; elimination does not form them."""
    unit = torch.zeros(32)
    unit[0] = 1.0
    made = inputs

    def equal_keys(*args):
        given = made(*args)
        given["k"] = unit.to(DEVICE).expand_as(given["k"]).contiguous()
        given["beta"] = torch.ones_like(given["beta"])
        return given

    monkeypatch.setitem(globals(), "inputs", equal_keys)
    found = errors(gen, "none", (1, 130, 1, 1, 32, 16))
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("decay", DECAYS)
def test_summaries_say_what_the_tokens_do_to_a_state(gen, whole, decay):
    """A X + S is the state that leaves for the X that enters; D is the gradient of X through the outputs alone."""
    given = inputs(gen, decay, (1, 150, 1, 2, 32, 24, 1), 0.1, torch.float32)
    state = given.pop("state")
    x, op = inputs_of(**given, scale=0.3, segments=Segments(1, 150)), delta.TritonDelta()
    summary, partial = op.summarize(x, wanted=True)
    o, outgoing, kept = op.finish(x, partial, Pending(lambda: state))
    assert error(summary.transition @ state + summary.state, outgoing.wait()) < EXACT
    do = torch.randn(o.shape, generator=gen).to(DEVICE)
    d, partial = op.summarize_grad(x, kept, do, wanted=True)
    assert error(d, op.finish_grad(x, kept, partial, Pending(lambda: None)).incoming.wait()) < EXACT
    d_outgoing = torch.randn(state.shape, generator=gen).to(DEVICE)
    wanted = d + summary.transition.mT @ d_outgoing
    assert error(op.finish_grad(x, kept, partial, Pending(lambda: d_outgoing)).incoming.wait(), wanted) < EXACT


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_all_sequences_together_have_no_more_tiles_than_wanted(batch):
    q = torch.empty(batch, 131072, 4, 128, device="meta")
    x = inputs_of(q, q, q, None, q[..., 0], 1.0, Segments(batch, 131072))
    for wanted in (33, 66):
        assert 0.9 * wanted < batch * cdiv(131072, delta.delta_tile_length(x, wanted)) <= wanted


@pytest.mark.parametrize("decay", DECAYS)
def test_equals_the_recurrent_form_where_summaries_are_wanted(gen, whole, decay):
    """What comes in after them is part of outputs and gradients."""
    found = errors(gen, decay, (2, 150, 1, 2, 40, 16), boundary=Asked)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
def test_packed_documents_where_summaries_are_wanted(gen, whole, decay):
    """Of several tiles, one of them."""
    found = errors(gen, decay, (1, 220, 1, 1, 32, 24), offsets=[0, 1, 1, 180, 220], boundary=Asked)
    assert max(found.values()) < EXACT, found


def test_twice_the_same_gives_the_same_bits(gen):
    given = inputs(gen, "scalar", (1, 130, 1, 2, 32, 16, 1), 0.1, torch.float32)
    state = given.pop("state")
    x, op = inputs_of(**given, scale=0.3, segments=Segments(1, 130)), delta.TritonDelta()
    partials = [op.summarize(x, wanted=False)[1] for _ in range(2)]
    (o, outgoing, _), (o_again, again, _) = (op.finish(x, partial, Pending(lambda: state)) for partial in partials)
    assert torch.equal(o, o_again) and torch.equal(outgoing.wait(), again.wait())


@pytest.mark.parametrize("dtype", [torch.float32] + ([torch.bfloat16] if DEVICE.type == "cuda" else []))
@pytest.mark.parametrize(("decay", "boundary"), [("scalar", Alone), ("diagonal", Alone), ("scalar", Asked)])
def test_large_heads(gen, whole, decay, boundary, dtype):
    """The interpreter has no bf16 arithmetic."""
    found = errors(gen, decay, (1, 140, 1, 1, 160, 136), dtype=dtype, boundary=boundary)
    assert max(found.values()) < (EXACT if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), found


def test_the_public_function_takes_a_diagonal_decay_and_refuses_larger_heads(gen):
    given = inputs(gen, "diagonal", (1, 20, 1, 2, 32, 16, 1), 0.1, torch.float32)
    tensors = [given[name] for name in ("q", "k", "v", "beta", "decay")]
    found, wanted = (
        delta_rule(*tensors, initial_state=given["state"], output_final_state=True, backend=backend)
        for backend in ("triton", "reference")
    )
    assert max(error(x, y) for x, y in zip(found, wanted, strict=True)) < EXACT
    x = torch.zeros(1, 2, 1, 257, device=DEVICE)
    with pytest.raises(ValueError, match="at most 256"):
        delta_rule(x, x, x, x[..., 0], backend="triton")
