"""The Triton op for a diagonal decay against the token-by-token form in float64, on a GPU or in the interpreter."""

import pytest
import torch
from torch import Tensor

from lasp.kernels.recurrence import Alone, run
from lasp.kernels.reference.chunk import ChunkedOp
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from lasp.kernels.triton.diagonal.op import TritonDiagonal
from lasp.kernels.triton.shared import tiles
from tests.kernels.boundary import Asked
from tests.parallel.inputs import error, inputs_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # the interpreter's bf16 is wrong
    DTYPES.append(torch.bfloat16)
NAMES = ("o", "final_state", "dq", "dk", "dv", "ddecay", "dstate")
# bf16: states and scores are operands in bf16
FLOOR = {torch.float32: 5e-6, torch.float16: 5e-6, torch.bfloat16: 4e-3}
# Of gates that open and close within a chunk: their sums reach hundreds, where fp32 numbers lie 3e-5 apart, and weights
# that are not small are differences of such sums.
CLOSING_FLOOR = 1.5e-5
GATES = {
    "open": lambda u: 0 * u,
    "weak": lambda u: -0.1 * u,
    "steep": lambda u: -20 * u,
    "closed": lambda u: -50 + 0 * u,
    "closing": lambda u: torch.where(u < 0.1, -50.0, -0.1 * u),
}
CASES = [(dtype, gate) for dtype in DTYPES for gate in GATES if dtype != torch.float16 or gate in ("weak", "closing")]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of scores that are masked


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Tiles of 64 tokens, so that states pass through all three phases."""
    monkeypatch.setattr(tiles, "LONGEST_TILE", 64)


def draw(gen: torch.Generator, dtype, gate: str, tokens: int, *, batch=1, q_heads=1, heads=2, k=32, v=16, states=None):
    """q, k, v, decay (fp32), the initial states, and gradients of o and of the final states."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    g = GATES[gate](torch.rand(batch, tokens, heads, k, generator=gen))
    states = (states or batch, heads, k, v)
    inputs = normal(batch, tokens, q_heads, k), 0.3 * normal(batch, tokens, q_heads, k), normal(batch, tokens, heads, v)
    do = normal(batch, tokens, heads, v).to(dtype)
    return [x.to(DEVICE) for x in (*(x.to(dtype) for x in inputs), g, normal(*states), do, normal(*states))]


def through(call, tensors: list[Tensor]) -> list[Tensor]:
    """o, the final states and the gradients of the five inputs."""
    leaves = [x.detach().requires_grad_() for x in tensors[:5]]
    found = call(*leaves)
    return [*found, *torch.autograd.grad(found, leaves, tensors[5:])]


def by(op, cu_seqlens=None, scale=0.7, boundary=Alone):
    def call(q, k, v, g, state):
        return run(op, boundary(), inputs_of(q, k, v, g, None, scale, Segments(*v.shape[:2], cu_seqlens)), state, True)

    return call


def check(tensors: list[Tensor], offsets=None, scale=0.7, boundary=Alone) -> None:
    """Errors of at most twice those of PyTorch in the same dtype, plus a floor."""
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)

    def definition(q, k, v, g, state):
        return recurrent(q, k, v, g, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)

    wanted = through(definition, [x.double() for x in tensors])
    plain = through(by(ChunkedOp(), cu_seqlens, scale), tensors)
    got = through(by(TritonDiagonal(), cu_seqlens, scale, boundary), tensors)
    dtype = tensors[0].dtype
    closes = bool((tensors[3] < -10).any() and (tensors[3] > -1).any())
    least = max(FLOOR[dtype], CLOSING_FLOOR if closes else 0.0)
    query_terms = (tensors[0].double() * wanted[2]).norm()  # of the two sums whose difference the gates' gradient is
    for name, x, y, z in zip(NAMES, got, plain, wanted, strict=True):
        assert x.dtype == y.dtype and bool(x.isfinite().all()), name
        floor = least * (max(1.0, (query_terms / z.norm().clamp(min=1e-3)).item()) if name == "ddecay" else 1.0)
        assert error(x.double(), z) <= 2 * error(y.double(), z) + floor, name


@pytest.mark.parametrize(("dtype", "gate"), CASES, ids=str)
def test_equals_the_definition(gen, dtype, gate):
    check(draw(gen, dtype, gate, 70))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_any_length(gen, dtype, tokens):
    check(draw(gen, dtype, "weak", tokens))


@pytest.mark.parametrize("boundary", [Alone, Asked])
@pytest.mark.parametrize("gate", ["weak", "closing"])
def test_packed_documents(gen, gate, boundary):
    """Of several tiles, some of them."""
    offsets = [0, 1, 1, 70, 204, 220]
    check(draw(gen, torch.float32, gate, 220, states=5), offsets, boundary=boundary)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries_that_are_wanted_change_nothing(gen, dtype):
    check(draw(gen, dtype, "weak", 150, batch=2, k=40, v=24), boundary=Asked)


@pytest.mark.parametrize("gate", ["weak", "closing"])
@pytest.mark.parametrize(("k", "v"), [(40, 24), (72, 16), (32, 100)])
def test_grouped_heads_and_sizes_that_are_no_powers_of_two(gen, gate, k, v):
    check(draw(gen, torch.float32, gate, 40, batch=2, q_heads=1, k=k, v=v))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes Triton's interpreter long")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_heads(gen, dtype):
    check(draw(gen, dtype, "weak", 150, k=256, v=256))


def test_every_output_is_written_and_the_same_inputs_give_the_same_bits(gen, monkeypatch):
    """Fresh memory is poisoned: what a kernel forgot to write would be NaN."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    tensors = draw(gen, torch.float32, "closing", 100, k=24)
    first = through(by(TritonDiagonal()), tensors)
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(new_empty))
    again = through(by(TritonDiagonal()), tensors)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_the_summary_is_the_final_state_from_zero_and_the_decay_of_the_whole(gen):
    q, k, v, g, state, _, _ = draw(gen, torch.float32, "weak", 150)
    x = inputs_of(q, k, v, g, None, 0.7, Segments(1, 150))
    summary, _ = TritonDiagonal().summarize(x, True)
    assert error(summary.transition.double(), g.double().sum(1)) < 1e-6
    carried = summary.transition.exp()[..., None] * state + summary.state
    wanted = recurrent(*(t.double() for t in (q, k, v, g)), initial_state=state.double())[1]
    assert error(carried.double(), wanted) < 1e-6
