"""Vector gates' kernels for Hopper: against float64 on such a GPU. (That they compile: test_triton_hopper.)"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels import test_triton_diagonal
from tests.kernels.boundary import Asked
from tests.kernels.test_triton_hopper import HOPPER, hopper_launches, launched  # noqa: F401, a fixture
from tests.kernels.test_triton_linear import run
from tests.parallel.inputs import error, inputs_of

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that they run with")
SIZE, TOKENS, TILE = 128, 701, 192
DOCUMENTS = (0, 5, 5, 70, 640, TOKENS)
GATES = test_triton_diagonal.GATES | {
    "weak, then steep": lambda u: torch.where(torch.arange(TOKENS)[:, None, None] // 200 % 2 == 0, -0.1, -5.0) * u,
}
HEADS = {  # q/k heads, heads, heads at a time in the delta rule's backward
    "each its own": (2, 2, 2),
    "in pairs": (2, 4, 2),
    "summed over two at a time": (1, 4, 2),
    "summed in fp32": (1, 6, 1),
}


@pytest.fixture
def errors(gen, monkeypatch, launched):  # noqa: F811
    """Relative errors by norm of outputs, states and gradients, with whatever is left unwritten NaN, the same bits
    twice, and none but kernels for Hopper."""
    from lasp.kernels.triton.delta import op
    from lasp.kernels.triton.shared import tiles

    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: empty_like(*a, **o).fill_(torch.nan))
    monkeypatch.setattr(op, "delta_tile_length", lambda *_: TILE)
    monkeypatch.setattr(tiles, "tile_length", lambda *_: TILE)
    monkeypatch.setattr(op, "TOKENS_AT_ONCE", 0)
    monkeypatch.setattr(op, "multiprocessors", lambda device: 1)

    def found(delta: bool, gates: str, heads: str = "each its own", offsets=None, boundary=Alone, dtype=torch.float32):
        q_heads, count, at_once = HEADS[heads]
        monkeypatch.setattr(op, "HEADS_AT_ONCE", at_once)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen)

        states = len(offsets or (0, TOKENS)) - 1, count, SIZE, SIZE
        half = {
            "q": normal(1, TOKENS, q_heads, SIZE),
            "k": normalize(normal(1, TOKENS, q_heads, SIZE), dim=-1),
            "v": normal(1, TOKENS, count, SIZE),
            "do": normal(1, TOKENS, count, SIZE),
        }
        if delta:
            half["beta"] = torch.rand(1, TOKENS, count, generator=gen)
        given = {name: x.to("cuda", torch.bfloat16) for name, x in half.items()}
        given["decay"] = GATES[gates](torch.rand(1, TOKENS, count, SIZE, generator=gen)).to("cuda", dtype)
        given["initial_state"] = normal(*states).cuda()
        do, d_final = given.pop("do"), normal(*states).cuda()
        cuts = None if offsets is None else torch.tensor(offsets, device="cuda")

        def by_kernels(q, k, v, decay, initial_state, beta=None):
            x = inputs_of(q, k, v, decay, beta, SIZE**-0.5, Segments(1, TOKENS, cuts))
            return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend="triton")

        got, again = (run(by_kernels, given, do, d_final) for _ in range(2))
        other = [name for name in got if not torch.equal(got[name], again[name])]
        assert not other, f"the same inputs gave other bits of {other}"
        assert hopper_launches.strangers(launched) == set()
        exact = {name: x.double() for name, x in given.items()}
        wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cuts)
        return {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}

    return found


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_every_gate(errors, delta, gates):
    """Of the gradient of gates, and of states, that are shut for good nothing is left but rounding."""
    found = errors(delta, gates)
    if gates == "closed":
        found = {name: found[name] for name in found.keys() - {"ddecay", "dinitial_state", "state"}}
    assert max(found.values()) < 2 * torch.finfo(torch.bfloat16).eps, found


@pytest.mark.parametrize("boundary", [Alone, Asked])
@pytest.mark.parametrize("gates", ["weak", "weak, then steep"])
@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_documents(errors, delta, gates, boundary):
    found = errors(delta, gates, "in pairs", DOCUMENTS, boundary)
    assert max(found.values()) < 2 * torch.finfo(torch.bfloat16).eps, found


@pytest.mark.parametrize("heads", list(HEADS)[1:])
@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_grouped_heads_and_gates_in_bf16(errors, delta, heads):
    found = errors(delta, "weak", heads, dtype=torch.bfloat16)
    assert max(found.values()) < 2 * torch.finfo(torch.bfloat16).eps, found
