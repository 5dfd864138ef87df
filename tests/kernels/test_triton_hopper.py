"""The scans for Hopper: against the token-by-token form in float64 on such a GPU, elsewhere that they compile."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lasp.kernels import delta_rule
from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone
from lasp.kernels.reference.chunk import CHUNK, read, write
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from lasp.kernels.summary import SHUT, apply
from tests.kernels.boundary import Asked
from tests.kernels.test_triton_linear import run
from tests.parallel.inputs import error, inputs_of

config = pytest.importorskip("lasp.kernels.triton.device")
pytest.importorskip("triton.experimental.gluon")
hopper_launches = pytest.importorskip("tests.kernels.hopper_launches")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and config.GLUON
ROOT = Path(__file__).parents[2]
HEADS, SIZE, TILE = 4, config.HOPPER_HEAD, 192
SHAPES = {  # batch, tokens, q/k heads, document offsets
    "one chunk": (1, 64, 4, None),
    "odd length, two sequences": (2, 701, 4, None),
    "grouped heads": (1, 500, 2, None),
    "documents, one of them empty": (1, 901, 4, (0, 5, 5, 70, 640, 901)),
}
GATE_FLOOR = torch.finfo(torch.bfloat16).eps  # kernels sum differences of larger, rounded numbers
DECAYS = {"none": None, "constant": 0.05, "scalar": 0.05, "open gate": 0.0, "closing gate": 50.0, "shut gates": 0.05}


@pytest.mark.parametrize("kind", hopper_launches.CASES)
def test_what_hopper_launches_is_for_it_and_compiles(kind):
    """Without a GPU: see hopper_launches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.hopper_launches", kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert hopper_launches.strangers({kernel["name"] for kernel in kernels}) == set()
    for kernel in kernels:
        assert kernel["multiplies"] and kernel["waits"], kernel  # see lasp.kernels.triton.pdl
        assert kernel["constants"] == 0, kernel
        assert kernel["unwritten"] == [], kernel  # see machine_code


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of lasp's kernels that have been launched since."""
    from triton.runtime.jit import JITFunction

    from lasp.kernels.triton import launch

    names: set[str] = set()
    run_kernel = JITFunction.run

    def noted(kernel, *args, **options):
        if kernel.fn.__module__.startswith("lasp."):
            names.add(hopper_launches.name_of(kernel))
        return run_kernel(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", noted)
    monkeypatch.setattr(launch, "_compiled", {})  # Triton is asked once more for each of them
    return names


def in_pytorch(q, k, v, decay, initial_state, beta=None, *, cu_seqlens=None):
    """The chunk form with a gate for each token. For bf16 its products are in bf16; gradients are autograd's."""
    batch, tokens, heads, _ = v.shape
    offsets = range(0, batch * tokens + 1, tokens) if cu_seqlens is None else cu_seqlens.tolist()
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    rows = [None if x is None else x.flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v, decay, beta)]
    outputs, ends = [], []
    with torch.autocast(v.device.type, torch.bfloat16, enabled=v.dtype == torch.bfloat16):
        for state, (start, stop) in zip(initial_state[:, None], pairwise(offsets), strict=True):
            for first in range(start, stop, CHUNK):
                cut = slice(first, min(first + CHUNK, stop))
                qc, kc, vc, gates, betas = (None if x is None else x[:, :, cut].to(initial_state.dtype) for x in rows)
                b = gates.double().cumsum(2)
                a, s, u, w = write(kc, vc, b, betas)
                r, y = read(qc * SIZE**-0.5, kc, b, u, w)
                outputs.append(r @ state + y)
                state = apply(a, state) + s
            ends.append(state)
    o = torch.cat(outputs, 2)[0].transpose(0, 1).unflatten(0, (batch, tokens))
    return o.to(v.dtype), torch.cat(ends).to(initial_state.dtype)


@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_what_kernels_errors_are_compared_with_is_the_same_function(gen, kind):
    def normal(*size):
        return torch.randn(*size, generator=gen, dtype=torch.float64) / SIZE**0.5

    q, k, v = (normal(1, 100, heads, SIZE) for heads in (1, 1, 2))
    tensors = {"q": q, "k": k, "v": v, "decay": -torch.rand(1, 100, 2, generator=gen, dtype=torch.float64)}
    tensors |= {"initial_state": normal(3, 2, SIZE, SIZE)} | ({"beta": normal(1, 100, 2)} if kind == "delta" else {})
    do, d_final, cuts = normal(1, 100, 2, SIZE), normal(3, 2, SIZE, SIZE), torch.tensor([0, 5, 5, 100])
    got, wanted = (run(form, tensors, do, d_final, cu_seqlens=cuts) for form in (in_pytorch, recurrent))
    assert max(error(got[name], wanted[name]) for name in wanted) < 1e-10


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that these kernels run with")
@pytest.mark.parametrize("boundary", [Alone, Asked])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_equals_the_definition(gen, monkeypatch, launched, kind, shape, decay, boundary):
    """Outputs, states and every gradient, with the same bits twice; whatever is left unwritten is NaN."""
    from lasp.kernels.triton.delta import op
    from lasp.kernels.triton.shared import tiles

    monkeypatch.setattr(tiles, "tile_length", lambda *_: TILE)
    monkeypatch.setattr(op, "delta_tile_length", lambda *_: TILE)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **o: new_empty(*a, **o).fill_(torch.nan))
    batch, tokens, q_heads, offsets = SHAPES[shape]
    strength = DECAYS[decay]
    rows = None if strength is None else (HEADS,) if decay == "constant" else (batch, tokens, HEADS)

    def normal(*size):
        return torch.randn(*size, generator=gen).to("cuda", torch.bfloat16)

    g = None if rows is None else (-torch.rand(*rows, generator=gen) * strength).cuda()
    if decay == "shut gates":
        g[:, ::9], g[:, 5::45] = -torch.inf, -1e4
        g[:, 64:80, 1] = -100.0
    tensors = {
        "q": normal(batch, tokens, q_heads, SIZE),
        "k": normal(batch, tokens, q_heads, SIZE) / SIZE**0.5,
        "v": normal(batch, tokens, HEADS, SIZE),
        "decay": g,
        "beta": torch.rand(batch, tokens, HEADS, generator=gen).to("cuda", torch.bfloat16),
        "initial_state": normal(batch if offsets is None else len(offsets) - 1, HEADS, SIZE, SIZE).float(),
    }
    if kind == "linear":
        del tensors["beta"]
    else:
        tensors["k"] = torch.nn.functional.normalize(tensors["k"].float(), dim=-1).bfloat16()
    cu_seqlens = None if offsets is None else torch.tensor(offsets, device="cuda")
    do, d_final = normal(batch, tokens, HEADS, SIZE), torch.randn_like(tensors["initial_state"])

    def by_kernels(q, k, v, decay, initial_state, beta=None):
        x = inputs_of(q, k, v, decay, beta, SIZE**-0.5, Segments(batch, tokens, cu_seqlens))
        return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend="triton")

    got, again = (run(by_kernels, tensors, do, d_final) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got), "the same inputs gave other bits"
    assert hopper_launches.strangers(launched) == set()
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cu_seqlens)
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    if decay == "shut gates":
        assert bool((got["ddecay"][g <= -104] == 0).all())
    off, eps = found.pop("ddecay", 0.0), torch.finfo(torch.bfloat16).eps
    assert max(found.values()) < 2 * eps, found
    if kind == "linear":
        assert off < (5e-3 if decay == "shut gates" else 3e-3), off
    elif decay in ("scalar", "shut gates"):
        tensors["decay"] = g.clamp_min(SHUT[torch.float32])  # PyTorch would take the difference of infinite sums
        own = run(in_pytorch, tensors, do, d_final, cu_seqlens=cu_seqlens)["ddecay"]
        assert off < 2 * error(own.double(), wanted["ddecay"]) + GATE_FLOOR, off
    elif off:  # what is left of sums of rounded numbers over a tile, which nearly cancel
        terms = (tensors["q"].double() * wanted["dq"]).sum(-1).norm()
        assert off * wanted["ddecay"].norm() < 2 * eps * TILE**0.5 * terms


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that these kernels run with")
@pytest.mark.parametrize("decay", ["none", "scalar"])
def test_nothing_enters_whole_sequences_and_nobody_asks_for_what_leaves(gen, monkeypatch, decay):
    from lasp.kernels.triton.delta import op

    monkeypatch.setattr(op, "ENOUGH_SCANS", 1)
    shape = (3, 333, HEADS, SIZE)
    q, k, v, do = (torch.randn(shape, generator=gen).to("cuda", torch.bfloat16) for _ in range(4))
    tensors = {"q": q, "k": torch.nn.functional.normalize(k.float(), dim=-1).bfloat16(), "v": v}
    tensors["beta"] = torch.rand(shape[:3], generator=gen).to("cuda", torch.bfloat16)
    if decay == "scalar":
        tensors["decay"] = -0.05 * torch.rand(shape[:3], generator=gen).cuda()

    def results(backend, cast):
        leaves = {name: cast(x).detach().clone().requires_grad_() for name, x in tensors.items()}
        o, _ = delta_rule(**leaves, backend=backend)
        return [o, *torch.autograd.grad(o, list(leaves.values()), cast(do))]

    pairs = zip(results("triton", lambda x: x), results("reference", torch.Tensor.double), strict=True)
    assert max(error(x.double(), y) for x, y in pairs) < 2 * torch.finfo(torch.bfloat16).eps
