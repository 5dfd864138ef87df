"""Scalar classes chunk by chunk, as large heads have them: in the interpreter, where there is no GPU, small ones."""

import pytest
import torch

from lasp.kernels import linear_attention
from lasp.kernels.reference.recurrent import recurrent
from tests.kernels.test_triton_linear import DEVICE, DTYPES, errors, poisoned_memory, run, short_tiles
from tests.parallel.inputs import error

chunkwise = pytest.importorskip("lasp.kernels.triton.scalar.chunkwise")
__all__ = ["poisoned_memory", "short_tiles"]  # fixtures
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of masked places
HALF = DTYPES[1:]
GATE_LIMIT = {torch.bfloat16: 3e-3, torch.float16: 1e-3}
SIZES = {"small": (2, 32, 16)} | ({"large": (2, 256, 256), "wide": (1, 128, 256)} if DEVICE == "cuda" else {})


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(chunkwise, "SMALL", 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
@pytest.mark.parametrize("shape", ["grouped heads", "documents", "odd sizes"])
def test_equals_the_definition(gen, shape, decay, dtype):
    found = errors(gen, decay, shape, dtype)
    assert max(found.values()) < 2 * torch.finfo(dtype).eps, found


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gate", [0.0, -0.08, -1.0, -8.0, -50.0])
@pytest.mark.parametrize("size", SIZES)
def test_every_gate(gen, size, gate, dtype):
    """Packed documents, each q/k head for all heads."""
    heads, key_dim, value_dim = SIZES[size]
    offsets = torch.tensor([0, 5, 5, 260, 300], device=DEVICE)

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(DEVICE)

    q, k = (normal(1, 300, 1, key_dim).to(dtype) for _ in range(2))
    v, do = (normal(1, 300, heads, value_dim).to(dtype) for _ in range(2))
    tensors = {"q": q, "k": torch.nn.functional.normalize(k.float(), dim=-1).to(dtype), "v": v}
    tensors["decay"] = torch.full((1, 300, heads), gate, device=DEVICE)
    tensors["initial_state"], d_final = (normal(4, heads, key_dim, value_dim) for _ in range(2))
    options = {"output_final_state": True, "cu_seqlens": offsets}
    got = run(linear_attention, tensors, do, d_final, **options, backend="triton")
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=offsets)
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    assert found.pop("ddecay") < GATE_LIMIT[dtype], found
    assert max(found.values()) < 2 * torch.finfo(dtype).eps, found


def test_states_that_fp16_has_no_room_for(gen):
    """Whose largest numbers are some hundred thousands, and whose gradients are some millionths."""

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(DEVICE)

    q, k, v, do = (normal(1, 200, 1, 32).half() for _ in range(4))
    tensors = {"q": q / 64, "k": k.abs() * 8, "v": v.abs() * 128}
    tensors |= {"decay": torch.full((1, 200, 1), -1e-3, device=DEVICE), "initial_state": normal(1, 1, 32, 32) * 1e5}
    do, d_final = do / 1024, normal(1, 1, 32, 32) * 1e-6
    got = run(linear_attention, tensors, do, d_final, output_final_state=True, backend="triton")
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double())
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    assert max(found.values()) < 2 * torch.finfo(torch.float16).eps, found
