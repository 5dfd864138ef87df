"""Triton's linear attention, in the interpreter where there is no GPU, against the token-by-token form in float64."""

import pytest
import torch

from lasp.kernels import linear_attention
from lasp.kernels.linear import run_op
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from lasp.kernels.summary import apply
from tests.kernels.boundary import Asked
from tests.parallel.inputs import error, inputs_of

tiles = pytest.importorskip("lasp.kernels.triton.shared.tiles")
scalar = pytest.importorskip("lasp.kernels.triton.scalar.op")
tile_length = tiles.tile_length  # tests replace it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Twice the rounding of the dtype, as same-dtype PyTorch: inputs and outputs are rounded, sums are fp32. The interpreter
# has no bf16 arithmetic.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
SHAPES = {  # batch, tokens, q/k heads, heads, K, V, document offsets
    "grouped heads": (2, 150, 2, 4, 32, 16, None),
    "documents": (1, 150, 1, 2, 32, 16, (0, 5, 5, 70, 150)),
    "odd sizes": (1, 63, 1, 1, 40, 24, None),
    "one token": (1, 1, 2, 2, 32, 16, None),
    "keys wider than a block": (1, 70, 1, 1, 72, 16, None),
    "values wider than a block": (1, 70, 1, 1, 32, 72, None),
}
if DEVICE == "cuda":
    SHAPES["the largest heads"] = (1, 150, 1, 2, 256, 256, None)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """So that segments have several."""
    monkeypatch.setattr(tiles, "tile_length", lambda *_: 64)


def draw(gen, decay, shape, dtype, strength=0.05):
    batch, tokens, q_heads, heads, key_dim, value_dim, offsets = SHAPES[shape]

    def normal(*size):
        return torch.randn(*size, generator=gen)

    q, k = (normal(batch, tokens, q_heads, key_dim) for _ in range(2))
    rows = {"none": None, "constant": (heads,), "scalar": (batch, tokens, heads)}[decay]
    tensors = {
        "q": q.to(dtype),
        "k": (k / key_dim**0.5).to(dtype),
        "v": normal(batch, tokens, heads, value_dim).to(dtype),
        "decay": None if rows is None else -torch.rand(*rows, generator=gen) * strength,
        "initial_state": normal(batch if offsets is None else len(offsets) - 1, heads, value_dim, key_dim).mT,
    }
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device=DEVICE)
    return {name: x if x is None else x.to(DEVICE) for name, x in tensors.items()}, cu_seqlens


def run(function, tensors, do, d_final, **options):
    """Outputs, final state and every gradient, by name."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in tensors.items()
        if x is not None and not (name == "decay" and x.ndim == 1)
    }
    o, state = function(**(tensors | leaves), **options)
    grads = torch.autograd.grad([o, state], list(leaves.values()), [do, d_final])
    return {"o": o, "state": state} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def errors(gen, decay, shape, dtype, strength=0.05):
    """Relative errors of Triton's results, which come out with the same bits twice."""
    tensors, cu_seqlens = draw(gen, decay, shape, dtype, strength)
    do = torch.randn(tensors["v"].shape, generator=gen).to(DEVICE, dtype)
    d_final = torch.randn(tensors["initial_state"].shape, generator=gen).to(DEVICE)
    options = {"cu_seqlens": cu_seqlens, "output_final_state": True}
    got, again = (run(linear_attention, tensors, do, d_final, **options, backend="triton") for _ in range(2))
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cu_seqlens)
    assert all(torch.equal(got[name], again[name]) for name in got), "the same inputs gave other bits"
    return {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # the interpreter computes masked places
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(gen, shape, decay, dtype):
    found = errors(gen, decay, shape, dtype)
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert max(found.values()) < tolerance, found


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("strength", [0.0, 100.0], ids=["open gate", "closing gate"])
def test_gates_that_do_nothing_or_close(gen, strength):
    """Sums of closing gates reach -4600 in a chunk."""
    found = errors(gen, "scalar", "documents", torch.float32, strength)
    assert found.pop("ddecay") < (1e-4 if strength else 1e-5), found
    assert max(found.values()) < 2e-6, found


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("gate", [0.0, -0.08, -1.0, -1.6, -8.0, -50.0])
def test_the_gradient_of_gates_is_as_exact_at_every_gate(gen, monkeypatch, gate, dtype):
    """Also where only tokens side by side know of each other, and over tiles of many chunks, where errors add up."""
    monkeypatch.setattr(tiles, "tile_length", lambda *_: 1024)
    monkeypatch.setitem(SHAPES, "many chunks", (1, 500, 1, 2, 32, 32, None))
    tensors, _ = draw(gen, "scalar", "many chunks", dtype)
    tensors["decay"] = torch.full_like(tensors["decay"], gate)
    do = torch.randn(tensors["v"].shape, generator=gen).to(DEVICE, dtype)
    d_final = torch.zeros_like(tensors["initial_state"])
    got = run(linear_attention, tensors, do, d_final, output_final_state=True, backend="triton")
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double())
    assert error(got["ddecay"].double(), wanted["ddecay"]) < {torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_gates_as_steep_as_weights_are_products(gen, monkeypatch):
    """Of pairs in the wrong order these are out of range: 2^148 in a chunk as it is with bfloat16."""
    as_in_bfloat16 = scalar.ScalarConfig(chunk=64, warps=4, stages=1, widest=64, precision="ieee")
    monkeypatch.setattr(scalar, "scalar_config", lambda *_: as_in_bfloat16)
    tensors, cu_seqlens = draw(gen, "scalar", "documents", torch.float32)
    tensors["decay"] = torch.full_like(tensors["decay"], -1.6)
    do = torch.randn(tensors["v"].shape, generator=gen).to(DEVICE)
    d_final = torch.randn(tensors["initial_state"].shape, generator=gen).to(DEVICE)
    options = {"cu_seqlens": cu_seqlens, "output_final_state": True}
    got = run(linear_attention, tensors, do, d_final, **options, backend="triton")
    wanted = run(
        recurrent,
        {name: x.double() for name, x in tensors.items()},
        do.double(),
        d_final.double(),
        cu_seqlens=cu_seqlens,
    )
    for name in wanted:
        assert error(got[name].detach().double(), wanted[name].detach()) < 1e-4, name


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("shape", ["grouped heads", "documents", "values wider than a block"])
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
def test_equals_the_definition_where_summaries_are_wanted(gen, decay, shape):
    """What comes in after them is part of outputs and gradients; forward S and A, backward D say what becomes of it."""
    tensors, cu_seqlens = draw(gen, decay, shape, torch.float32)
    state, v, asked = tensors["initial_state"], tensors["v"], Asked()
    do, d_final = (torch.randn(x.shape, generator=gen).to(DEVICE) for x in (v, state))

    def told(q, k, v, decay, initial_state):
        x = inputs_of(q, k, v, decay, None, k.shape[-1] ** -0.5, Segments(*v.shape[:2], cu_seqlens))
        return run_op(x, asked, initial_state=initial_state, output_final_state=True, backend="triton")

    got = run(told, tensors, do, d_final)
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cu_seqlens)
    got["A X + S"] = apply(asked.summary.transition, state) + asked.summary.state
    got["A G + D"] = apply(asked.summary.transition, d_final) + asked.d_summary
    wanted |= {"A X + S": wanted["state"], "A G + D": wanted["dinitial_state"]}
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_all_sequences_together_have_no_more_tiles_than_are_walked_at_once(monkeypatch, batch):
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    for tokens in (1024, 8192):
        count = batch * tiles.cdiv(tokens, tile_length(batch, tokens, 8, torch.device(DEVICE)))
        assert count <= 2 * 132 // 8
        assert tokens == 1024 or count > 132 // 8 - batch


def test_what_triton_does_not_take_is_refused():
    x = torch.zeros(1, 4, 2, 32, device=DEVICE)
    refused = {
        "float64": lambda: linear_attention(*(x.double() for _ in range(3)), backend="triton"),
        "at most 256": lambda: linear_attention(x, x, x.new_zeros(1, 4, 2, 257), backend="triton"),
        "causal=False": lambda: linear_attention(x, x, x, causal=False, backend="triton"),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(DEVICE != "cuda", reason="the host has nothing to wait for")
def test_offsets_on_the_device_are_not_waited_for(gen):
    tensors, cu_seqlens = draw(gen, "scalar", "documents", torch.float32)
    options = {"cu_seqlens": cu_seqlens, "backend": "triton"}
    linear_attention(**tensors, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_attention(**tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 3, 2, 4]])
def test_offsets_are_looked_at_when_the_host_reads_them(offsets):
    with pytest.raises(ValueError, match="cu_seqlens"):
        _ = Segments(1, 4, torch.tensor(offsets)).offsets


def test_a_gates_gradient_from_every_chunk(gen):
    """What tokens read and write within the chunk, and what passes it, shut gates apart."""
    from lasp.kernels.triton.scalar.gates import chunk_gate_grads

    def normal(*shape):
        return torch.randn(*shape, generator=gen).to(DEVICE)

    chunks = Segments(1, 75, torch.tensor([0, 5, 75])).tiles(64, torch.device(DEVICE))
    reads, writes, products = normal(2, 1, 75, 3), normal(1, 1, 75, 3), normal(2, chunks.count, 3, 32)
    decay = -normal(1, 75, 3).abs() / 16
    decay[0, 70, 1] = -torch.inf
    got = chunk_gate_grads(chunks, decay, reads, writes, products)
    r, u, passed = reads.sum(0)[0], writes.sum(0)[0], products.sum((0, 3))
    for n, (start, length) in enumerate(zip(chunks.start.tolist(), chunks.length.tolist(), strict=True)):
        own = slice(start, start + length)
        wanted = r[own].flip(0).cumsum(0).flip(0) + u[own].cumsum(0) - u[own]
        wanted += passed[n] * decay[0, own].sum(0).exp()
        wanted[decay[0, own] == -torch.inf] = 0.0
        torch.testing.assert_close(got[0, own], wanted, rtol=1e-4, atol=1e-4)
