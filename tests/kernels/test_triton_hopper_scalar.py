"""The scans of scalar decays for Hopper, heads of every size and dtype, against the token-by-token form in float64."""

import pytest
import torch

from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels.boundary import Asked
from tests.kernels.test_triton_hopper import HOPPER, hopper_launches, launched
from tests.kernels.test_triton_linear import run
from tests.parallel.inputs import error, inputs_of

__all__ = ["launched"]  # a fixture
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that these run with")
TOKENS, CUTS = 701, (0, 5, 5, 70, 448, 701)
HEADS = {  # of q and k, of v, their sizes
    "alone": (4, 4, 64, 64),
    "grouped": (2, 4, 64, 64),
    "by threes": (2, 6, 64, 64),
    "wide": (2, 4, 128, 128),
    "one group": (1, 4, 128, 64),
}
GATES = {"none": None, "constant": -0.05, "open": 0.0, "weak": -0.05, "steep": -8.0, "closed": -50.0}


@pytest.mark.parametrize("boundary", [Alone, Asked])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_definition(gen, monkeypatch, launched, heads, gate, dtype, boundary):
    """Packed documents of odd lengths, in tiles of many chunks; the same bits twice; what is left unwritten is NaN."""
    from lasp.kernels.triton.shared import tiles

    monkeypatch.setattr(tiles, "tile_length", lambda *_: 512)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(torch.nan))
    q_heads, v_heads, size_k, size_v = HEADS[heads]

    def normal(*size):
        return torch.randn(*size, generator=gen).to("cuda", dtype)

    rate = GATES[gate]
    shape = (v_heads,) if gate == "constant" else (1, TOKENS, v_heads)
    states = len(CUTS) - 1, v_heads, size_k, size_v
    tensors = {
        "q": normal(1, TOKENS, q_heads, size_k),
        "k": torch.nn.functional.normalize(normal(1, TOKENS, q_heads, size_k).float(), dim=-1).to(dtype),
        "v": normal(1, TOKENS, v_heads, size_v),
        "decay": None if rate is None else torch.full(shape, rate, device="cuda"),
        "initial_state": normal(*states).float(),
    }
    cu_seqlens = torch.tensor(CUTS, device="cuda")
    do, d_final = normal(1, TOKENS, v_heads, size_v), normal(*states).float()

    def by_kernels(q, k, v, decay, initial_state):
        x = inputs_of(q, k, v, decay, None, size_k**-0.5, Segments(1, TOKENS, cu_seqlens))
        return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend="triton")

    got, again = (run(by_kernels, tensors, do, d_final) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got), "the same inputs gave other bits"
    assert hopper_launches.strangers(launched) == set()
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cu_seqlens)
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    assert found.pop("ddecay", 0.0) < {torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    assert max(found.values()) < 2 * torch.finfo(dtype).eps, found


@pytest.mark.parametrize("size", [64, 128])
def test_states_that_fp16_has_no_room_for(gen, size):
    """Whose largest numbers are some hundred thousands, and whose gradients are some millionths."""
    from lasp.kernels import linear_attention

    q, k, v, do = (torch.randn(1, 300, 2, size, generator=gen).to("cuda", torch.float16) for _ in range(4))
    tensors = {
        "q": q / 64,
        "k": k.abs() * 8,
        "v": v.abs() * 128,
        "decay": torch.full((1, 300, 2), -1e-3, device="cuda"),
    }
    tensors["initial_state"] = torch.randn(1, 2, size, size, generator=gen).cuda() * 1e5
    do, d_final = do / 1024, torch.randn(1, 2, size, size, generator=gen).cuda() * 1e-6
    got = run(linear_attention, tensors, do, d_final, output_final_state=True, backend="triton")
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double())
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    assert max(found.values()) < 2 * torch.finfo(torch.float16).eps, found
