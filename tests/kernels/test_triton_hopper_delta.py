"""The delta rule's kernels for Hopper, in every form they have: against float64 on such a GPU."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels.boundary import Asked
from tests.kernels.test_triton_hopper import HOPPER, hopper_launches, launched  # noqa: F401, a fixture
from tests.kernels.test_triton_linear import run
from tests.parallel.inputs import error, inputs_of

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that they run with")
SIZES = [(64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128), (256, 256)]
HALF = [torch.bfloat16, torch.float16]
TILE = 192
DOCUMENTS = (0, 5, 5, 70, 640, 701)
HEADS = {  # q/k heads, heads, heads at a time in backward
    "each its own": (3, 3, 2),
    "in pairs": (2, 4, 2),
    "summed over two at a time": (1, 4, 2),
    "summed in fp32": (1, 6, 1),
}


def draw(gen, size, dtype, heads, tokens=701, strength=0.05, count=1) -> dict[str, Tensor]:
    (key_dim, value_dim), (q_heads, heads, _) = size, HEADS[heads]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    gate = -strength * torch.rand(1, tokens, heads, generator=gen)
    halves = {
        "q": normal(1, tokens, q_heads, key_dim),
        "k": normalize(normal(1, tokens, q_heads, key_dim), dim=-1),
        "v": normal(1, tokens, heads, value_dim),
        "beta": torch.rand(1, tokens, heads, generator=gen),
        "do": normal(1, tokens, heads, value_dim),
    }
    state = {name: normal(count, heads, key_dim, value_dim).cuda() for name in ("initial_state", "d_final")}
    return {name: x.to("cuda", dtype) for name, x in halves.items()} | {"decay": gate.cuda()} | state


@pytest.fixture
def errors(monkeypatch, launched):  # noqa: F811
    """Relative errors by norm of outputs, states and gradients; what is left unwritten is NaN, and bits are the same
    twice."""
    from lasp.kernels.triton.delta import op

    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(torch.nan))
    monkeypatch.setattr(op, "delta_tile_length", lambda *_: TILE)
    monkeypatch.setattr(op, "TOKENS_AT_ONCE", 0)
    monkeypatch.setattr(op, "multiprocessors", lambda device: 1)

    def found(tensors: dict[str, Tensor], at_once: int, offsets=None, boundary=Alone) -> dict[str, float]:
        monkeypatch.setattr(op, "HEADS_AT_ONCE", at_once)
        given = dict(tensors)
        do, d_final = given.pop("do"), given.pop("d_final")
        cuts = None if offsets is None else torch.tensor(offsets, device="cuda")

        def by_kernels(q, k, v, decay, initial_state, beta):
            x = inputs_of(q, k, v, decay, beta, q.shape[-1] ** -0.5, Segments(q.shape[0], q.shape[1], cuts))
            return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend="triton")

        got, again = (run(by_kernels, given, do, d_final) for _ in range(2))
        assert all(torch.equal(got[name], again[name]) for name in got), "the same inputs gave other bits"
        assert hopper_launches.strangers(launched) == set()
        exact = {name: x.double() for name, x in given.items()}
        wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cuts)
        return {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}

    return found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_every_size(gen, errors, size, dtype):
    tensors = draw(gen, size, dtype, "in pairs", count=len(DOCUMENTS) - 1)
    found = errors(tensors, 2, DOCUMENTS, Asked)
    assert max(found.values()) < 2 * torch.finfo(dtype).eps, found


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [(128, 128), (128, 256)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_gradients_of_q_and_k_are_sums_over_their_heads(gen, errors, size, heads):
    found = errors(draw(gen, size, torch.bfloat16, heads), HEADS[heads][2])
    assert max(found.values()) < 2 * torch.finfo(torch.bfloat16).eps, found


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("strength", [0.0, 50.0], ids=["open gate", "closing gate"])
@pytest.mark.parametrize("size", [(64, 64), (128, 256), (256, 256)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_gates_that_do_nothing_or_close(gen, errors, size, strength, dtype):
    """Of what enters nothing is left behind a gate that closes; of its gradient so little that its digits are noise."""
    found = errors(draw(gen, size, dtype, "each its own", tokens=300, strength=strength), 2)
    assert found.pop("dinitial_state") < (2e-2 if strength else 2 * torch.finfo(dtype).eps)
    assert max(found.values()) < 2 * torch.finfo(dtype).eps, found
