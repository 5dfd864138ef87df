"""The states before chunks, in the interpreter where there is no GPU."""

import pytest
import torch

from lasp.kernels.segments import Segments
from tests.parallel.inputs import error

states = pytest.importorskip("lasp.kernels.triton.scalar.chunk_states")
gates = pytest.importorskip("lasp.kernels.triton.scalar.gates")
passing = pytest.importorskip("lasp.kernels.triton.shared.state_passing")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, CUTS, TILE, HEADS, K, V = 300, (0, 5, 5, 300), 128, 2, 32, 16
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2 * torch.finfo(torch.float16).eps}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_are_those_of_the_recurrence(gen, monkeypatch, dtype):
    """Packed documents, one of them empty: as many states as there are chunks, and no more."""
    k, v = (torch.randn(1, TOKENS, h, d, generator=gen).to(DEVICE, dtype) for h, d in ((1, K), (HEADS, V)))
    decay = -torch.rand(1, TOKENS, HEADS, generator=gen).to(DEVICE)
    segments = Segments(1, TOKENS, torch.tensor(CUTS))
    tiles, chunks = (segments.tiles(size, v.device) for size in (TILE, states.CHUNK))
    first_chunk = segments.cut(TILE, states.CHUNK, v.device).first_chunk
    initial = torch.randn(tiles.count, HEADS, K, V, generator=gen).to(DEVICE) * 1e5  # more than fp16 has room for
    cumulated = gates.cumulate(tiles, decay, v, states.CHUNK)
    new_empty = torch.Tensor.new_empty

    def poisoned(*size, **options):
        x = new_empty(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    found, ups = states.chunk_states(
        tiles, chunks.count, first_chunk, k, v, cumulated, passing.InitialStates(initial), precision="ieee"
    )
    assert (ups is None) == (dtype == torch.float32)
    got = found.double() if ups is None else found.double() * ups[..., None]
    wanted = torch.full_like(got, torch.nan)
    a, c, factor = k.double().expand(-1, -1, HEADS, -1)[0], v.double()[0], decay.double().exp()[0]
    for tile, (begin, length) in enumerate(zip(tiles.start.tolist(), tiles.length.tolist(), strict=True)):
        x = initial[tile].double()
        for place in range(length):
            if place % states.CHUNK == 0:
                wanted[first_chunk[tile] + place // states.CHUNK] = x
            t = begin + place
            x = factor[t, :, None, None] * x + a[t, :, :, None] * c[t, :, None, :]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert error(got.nan_to_num(), wanted.nan_to_num()) < TOLERANCES[dtype]
