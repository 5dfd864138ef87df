"""The walks for Hopper: against the token-by-token form in float64 on such a GPU, elsewhere that they compile."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lasp.kernels import delta_rule
from lasp.kernels.linear import run_op
from lasp.kernels.recurrence import Alone, Inputs
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from tests.kernels.boundary import Asked
from tests.kernels.test_triton_linear import run
from tests.parallel.inputs import error

config = pytest.importorskip("lasp.kernels.triton.device")
pytest.importorskip("triton.experimental.gluon")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and config.GLUON
HEADS, SIZE, TILE = 4, config.HOPPER_HEAD, 192
SHAPES = {  # batch, tokens, q/k heads, document offsets
    "one chunk": (1, 64, 4, None),
    "odd length, two sequences": (2, 701, 4, None),
    "grouped heads": (1, 500, 2, None),
    "documents, one of them empty": (1, 901, 4, (0, 5, 5, 70, 640, 901)),
}
DECAYS = {"none": None, "constant": 0.05, "scalar": 0.05, "open gate": 0.0, "closing gate": 50.0, "shut gates": 0.05}
LINEAR = [  # without gates or with scalar ones; what comes in is added or not
    {"DECAY": 0, "SUMS": False, "TRANSPOSED": False, "passed": None},
    {"DECAY": 2, "SUMS": True, "TRANSPOSED": True},
]
LINEAR += [constants | {"incoming": None, "passed": None} for constants in LINEAR]
KERNELS = {  # by module: the constants that its kernel is compiled with
    "tile_states": [{"DECAY": decay, "BACKWARD": backward} for decay in (0, 1, 2) for backward in (False, True)],
    "forward_scan": LINEAR,
    "reverse_scan": LINEAR,
    "delta_forward_scan": [{"DECAY": 2, "MODE": mode, "FINAL": mode < 2} for mode in (0, 2, 3)],
    "delta_reverse_scan": [{"DECAY": 2, "GRADIENTS": False, "FINAL": True}]
    + [{"DECAY": decay, "GRADIENTS": True, "FINAL": decay == 0} for decay in (0, 2)],
}
COMPILE = """
import importlib
import json
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.language import target_info
from lasp.kernels.triton.hopper.shared import SHARED

def current_target():
    return GPUTarget("cuda", 90, 32)

current_target.__triton_builtin__ = True
target_info.current_target = current_target  # there is none without a GPU

def rows_of(rows, width):
    return f"tensordesc<bf16[{rows}, {width}],{SHARED.value!r}>"

ROWS, HALVES = rows_of(64, 128), rows_of(64, 64)
KINDS = {name: ROWS for name in ("a", "b", "q", "k", "v", "do", "u", "dq_rows", "dk_rows", "dv_rows")}
KINDS |= {name: "*bf16" for name in ("y", "dq", "dk", "dv", "d_beta")}
KINDS |= {name: HALVES for name in ("c", "partner", "ut", "scores", "scores_rows", "y_rows")}
KINDS |= {"scale": "fp32", "TOKENS": "i64"}
KINDS |= {name: "i32" for name in ("H", "GA", "GB", "GC", "GP", "G", "FIRST_HEAD")}
KINDS |= {name: "*i64" for name in ("start", "first_chunk")} | {"length": "*i32", "owner": "*i32"}
module, every = sys.argv[1], json.loads(sys.argv[2])
kernel = getattr(importlib.import_module(f"lasp.kernels.triton.hopper.{module}"), "_" + module.removeprefix("delta_"))
names = kernel.arg_names
if module.startswith("delta"):
    KINDS["states"] = rows_of(128, 128)
for constants in every:
    if module == "delta_forward_scan":
        mode = constants["MODE"]
        KINDS |= {"scores": "*bf16", "y_rows": ROWS}
        absent = ("final", "transitions") if mode >= 2 else ("initial", "y", "y_rows")
        absent += () if mode == 3 else ("states",)
        absent += () if mode == 2 else ("q", "scores", "scores_rows")
    elif module == "delta_reverse_scan":
        absent = () if constants["FINAL"] else ("d_initial",)
        if not constants["GRADIENTS"]:
            absent += ("d_final", "v", "u", "states", "dq", "dq_rows", "dk", "dk_rows", "dv", "dv_rows", "d_beta")
        absent += () if constants["GRADIENTS"] and constants["DECAY"] else ("decay", "d_decay")
    else:
        absent = () if constants.get("SUMS") else ("partner", "products", "v_dv", "ends", "at_end")
        absent += () if constants["DECAY"] else ("gates",)
        absent += () if constants["DECAY"] and not constants.get("BACKWARD") else ("transitions",)
    constants = constants | dict.fromkeys(absent) | {"STAGES": 2}
    constants = {(names.index(name),): value for name, value in constants.items() if name in names}
    signature = {n: "constexpr" if (i,) in constants else KINDS.get(n, "*fp32") for i, n in enumerate(names)}
    source = GluonASTSource(kernel, signature, constants)
    warps = 8 if module.startswith("delta") else 4
    compiled = compile(source, target=current_target(), options={"num_warps": warps})
    assert "wgmma" in compiled.asm["ptx"] and len(compiled.asm["cubin"])
    assert "griddepcontrol.wait" in compiled.asm["ptx"]  # see lasp.kernels.triton.pdl
    assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
"""


@pytest.mark.parametrize("module", KERNELS)
def test_compiles_without_a_gpu(module):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, module, json.dumps(KERNELS[module])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and the version of Triton that these kernels run with")
@pytest.mark.parametrize("boundary", [Alone, Asked])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kind", ["linear", "delta"])
def test_equals_the_definition(gen, monkeypatch, kind, shape, decay, boundary):
    """Outputs, states and every gradient, with the same bits twice; whatever is left unwritten is NaN."""
    from lasp.kernels.triton.delta import forward_scan, op, portable, reverse_scan
    from lasp.kernels.triton.scalar import portable as scalar_portable
    from lasp.kernels.triton.shared import tiles

    monkeypatch.setattr(scalar_portable, "chunk_scan", None)  # nobody else serves
    monkeypatch.setattr(forward_scan, "_forward_scan", None)
    monkeypatch.setattr(reverse_scan, "_reverse_scan", None)
    monkeypatch.setattr(portable, "gradients", None)
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
        x = Inputs(q, k, v, decay, beta, SIZE**-0.5, Segments(batch, tokens, cu_seqlens))
        return run_op(x, boundary(), initial_state=initial_state, output_final_state=True, backend="triton")

    got, again = (run(by_kernels, tensors, do, d_final) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got), "the same inputs gave other bits"
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    wanted = run(recurrent, exact, do.double(), d_final.double(), cu_seqlens=cu_seqlens)
    found = {name: error(got[name].detach().double(), wanted[name].detach()) for name in wanted}
    if decay == "shut gates":
        assert bool((got["ddecay"][g <= -104] == 0).all())
    off, eps = found.pop("ddecay", 0.0), torch.finfo(torch.bfloat16).eps
    assert max(found.values()) < 2 * eps, found
    if off and strength == 0.05:
        assert off < 5e-2
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
