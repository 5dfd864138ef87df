"""Kernels for Hopper without a GPU (tests.kernels.emulator): against the token-by-token form in float64."""

from importlib import import_module

import pytest
import torch

from lasp.kernels.recurrence import Alone, run
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels.boundary import Asked
from tests.parallel.inputs import error, inputs_of

pytest.importorskip("triton.experimental.gluon")
if torch.cuda.is_available():
    pytest.skip("they run there", allow_module_level=True)

from tests.kernels import emulator

scalar, diagonal, delta = (import_module(f"lasp.kernels.triton.{room}.op") for room in ("scalar", "diagonal", "delta"))
OPS = {"linear": scalar.TritonLinear(), "vector": diagonal.TritonDiagonal(), "delta": delta.TritonDelta()}
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 6e-3, FP16: 8e-4}
TOKENS, TILE, DOCUMENTS = 650, 576, (0, 5, 5, 70, 650)  # tiles of more chunks than are fetched ahead
CASES = [  # kind, decay, q/k heads, heads, K, V, dtype, the steepest gates
    ("linear", "none", 1, 2, 128, 128, BF16, 0.0),
    ("linear", "constant", 2, 2, 128, 128, BF16, 0.1),
    ("linear", "scalar", 1, 2, 128, 128, BF16, 0.1),
    ("linear", "scalar", 1, 1, 128, 128, FP16, 3.0),
    ("linear", "none", 2, 2, 64, 64, BF16, 0.0),
    ("linear", "scalar", 2, 2, 64, 64, BF16, 0.1),
    ("linear", "scalar", 1, 2, 64, 64, FP16, 3.0),
    ("linear", "scalar", 1, 4, 128, 64, BF16, 0.1),  # a group's heads at once
    ("linear", "scalar", 1, 2, 128, 64, FP16, 3.0),
    ("vector", "diagonal", 1, 2, 128, 128, BF16, 0.1),
    ("vector", "diagonal", 1, 1, 128, 128, BF16, 8.0),  # secondary chunks
    ("delta", "none", 1, 2, 64, 64, BF16, 0.0),
    ("delta", "scalar", 1, 2, 128, 128, BF16, 0.1),
    ("delta", "scalar", 2, 2, 64, 64, FP16, 3.0),
    ("delta", "constant", 1, 1, 128, 256, BF16, 0.1),
    ("delta", "scalar", 1, 1, 256, 256, FP16, 0.1),
    ("delta", "diagonal", 1, 2, 128, 128, BF16, 0.1),
    ("delta", "diagonal", 1, 1, 128, 128, BF16, 8.0),
]


@pytest.fixture(autouse=True)
def as_on_hopper(gen, monkeypatch):
    """Its kernels serve, several tiles a document."""
    hopper = {name: import_module(f"lasp.kernels.triton.hopper.{name}") for name in ("scalar", "diagonal", "delta")}
    for op in (scalar, diagonal, delta):
        monkeypatch.setattr(op, "GLUON", True)
    for op in (scalar, diagonal):
        monkeypatch.setattr(op, "hopper", hopper[op.__name__.split(".")[-2]], raising=False)
    for name in ("Hopper", "HopperDiagonal"):
        monkeypatch.setattr(delta, name, getattr(hopper["delta"], name), raising=False)
    config = import_module("lasp.kernels.triton.delta.config")
    for module in (hopper["scalar"], config, import_module("lasp.kernels.triton.device")):
        monkeypatch.setattr(module, "on_hopper", lambda x: True)
    monkeypatch.setattr(import_module("lasp.kernels.triton.shared.tiles"), "tile_length", lambda *_: TILE)
    monkeypatch.setattr(delta, "SHORTEST_TILE", TILE)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 64)
    emulator.install(monkeypatch, seed=int(torch.randint(2**31, (), generator=gen)))


def draw(gen, case, offsets):
    _, decay, q_heads, heads, key_dim, value_dim, dtype, steepest = case

    def normal(*shape):
        return torch.randn(shape, generator=gen)

    rows = 1, TOKENS, heads
    gates = {"none": None, "constant": (heads,), "scalar": rows, "diagonal": (*rows, key_dim)}[decay]
    tensors = {
        "q": normal(1, TOKENS, q_heads, key_dim).to(dtype),
        "k": torch.nn.functional.normalize(normal(1, TOKENS, q_heads, key_dim), dim=-1).to(dtype),
        "v": normal(*rows, value_dim).to(dtype),
        "initial_state": normal(len(offsets) - 1, heads, key_dim, value_dim),
    }
    if gates is not None:
        tensors["decay"] = -steepest * torch.rand(gates, generator=gen)
    if case[0] == "delta":
        tensors["beta"] = torch.rand(rows, generator=gen)
    return tensors, normal(*rows, value_dim).to(dtype), normal(len(offsets) - 1, heads, key_dim, value_dim)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_equals_the_definition(gen, case):
    asked = CASES.index(case) % 2 == 1  # for summaries, of documents
    offsets = DOCUMENTS if asked else (0, TOKENS)
    tensors, do, d_state = draw(gen, case, offsets)
    cu_seqlens = torch.tensor(offsets) if asked else None
    segments = Segments(1, TOKENS, cu_seqlens)

    def emulated(given):
        x = inputs_of(*(given.get(name) for name in ("q", "k", "v", "decay", "beta")), 1.0, segments)
        return run(OPS[case[0]], Asked() if asked else Alone(), x, given["initial_state"], True)

    def results(function, dtype):
        given = {name: x if dtype is None else x.to(dtype) for name, x in tensors.items()}
        leaves = {n: x.detach().requires_grad_() for n, x in given.items() if n != "decay" or x.ndim > 1}
        o, state = function(given | leaves)
        grads = torch.autograd.grad([o, state], list(leaves.values()), [do.to(o.dtype), d_state.to(state.dtype)])
        return dict(zip(("o", "state", *leaves), (o, state, *grads), strict=True))

    wanted = results(lambda given: recurrent(**given, scale=1.0, cu_seqlens=cu_seqlens), torch.float64)
    found = {name: error(x.double(), wanted[name]) for name, x in results(emulated, None).items()}
    assert max(found.values()) < TOLERANCE[case[6]], found
