"""Triton's log-linear attention, in the interpreter where there is no GPU, against the definition in float64."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from lasp.kernels import log_linear_attention, log_linear_delta_rule
from lasp.kernels.pending import Pending
from lasp.kernels.reference.log_linear import LogLinearOp
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from lasp.kernels.segments import Segments
from tests.kernels.log_linear import Drawn, draw, log_linear_inputs_of, made_ready, results
from tests.kernels.test_triton_linear import DEVICE, DTYPES, poisoned_memory  # noqa: F401  a fixture
from tests.parallel.inputs import error

config = pytest.importorskip("lasp.kernels.triton.log_linear.config")
op = pytest.importorskip("lasp.kernels.triton.log_linear.op")
block_of = pytest.importorskip("lasp.kernels.triton.device").block_of
delta_op = pytest.importorskip("lasp.kernels.triton.log_linear_delta.op")
GPU = DEVICE == "cuda"
ROOT = Path(__file__).parents[2]
CASES = {
    "grouped heads": {"tokens": 45, "batch": 2, "heads": (1, 2)},
    "whole leaves": {"tokens": 128, "heads": (1, 1)},
    "documents": {"tokens": 80, "offsets": [0, 1, 1, 60, 80], "levels": 8, "heads": (1, 1)},
    "initial slots": {"tokens": 45, "seen": [77], "heads": (1, 1)},
    "initial slots in documents": {
        "tokens": 75,
        "offsets": [0, 1, 1, 45, 75],
        "seen": [7, 12, 130, 64],
        "heads": (1, 1),
    },
    "wide heads": {"tokens": 40, "seen": [5], "heads": (1, 1), "sizes": (40, 72)},
    "one token": {"tokens": 1, "heads": (1, 1), "levels": 1},
}


_ready: list[int] = []


@pytest.fixture(autouse=True)
def small(monkeypatch, gen):
    """Chunks, leaves and pieces so small that a few tokens need several of each."""

    def chosen(k, v):
        precision, chunk = "ieee" if v.dtype == torch.float32 else "tf32", 32 if GPU else 16  # see block_of
        return config.LogLinearConfig(leaf=2 * chunk, chunk=chunk, piece=2, widest=32, stages=1, precision=precision)

    monkeypatch.setattr(op, "log_linear_config", chosen)
    if GPU and not _ready:
        calls = [(case, torch.float32) for case in CASES.values()] + [(CASES["initial slots"], d) for d in DTYPES]
        calls += [(case | {"delta": True}, dtype) for case in DELTA_CASES.values() for dtype in DTYPES]
        made_ready(draw(gen, **case).to(dtype, torch.float32, DEVICE) for case, dtype in calls)
        _ready.append(1)


def errors(gen, drawn: Drawn, dtype) -> dict[str, float]:
    upstream: dict = {}
    rounded = drawn.to(dtype, torch.float32, DEVICE)
    exact = rounded.to(torch.float64, torch.float64)
    no_decay = {} if "decay" in drawn.tensors else {"decay": None}
    wanted = results(gen, partial(log_linear_recurrent, **no_decay), exact, upstream, final=True)
    upstream = {name: x.to(DEVICE, dtype if name == "o" else torch.float32) for name, x in upstream.items()}
    asked = {"output_final_state": True, "backend": "triton"} | no_decay
    function = log_linear_delta_rule if "beta" in drawn.tensors else log_linear_attention
    got = results(gen, function, rounded, upstream, final=True, **asked)
    return {name: error(got[name].double().cpu(), wanted[name]) for name in wanted}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in DTYPES for case in CASES if dtype == torch.float32 or case == "initial slots"],
)
def test_equals_the_definition(gen, case, dtype):
    found = errors(gen, draw(gen, **CASES[case]), dtype)
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert max(found.values()) < tolerance, found


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize("strength", [0.0, 8.0, 100.0], ids=["open gate", "strong gate", "closing gate"])
def test_gates_that_do_nothing_or_close(gen, strength):
    """The gradient of a gate is a sum in which nothing cancels, however much decays."""
    drawn = draw(gen, 50, heads=(1, 1), seen=[3], sizes=(32, 32))
    drawn.tensors["decay"] = -strength * torch.rand(drawn.tensors["decay"].shape, generator=gen).double()
    found = errors(gen, drawn, torch.float32)
    assert max(found.values()) < (2e-5 if strength else 2e-6), found


@pytest.mark.parametrize("seen", [None, [77]], ids=["from the start", "behind others"])
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
def test_summaries(gen, seen, delta, monkeypatch):
    """What others are told of a segment: the same as the reference tells them."""
    monkeypatch.setattr(delta_op, "KEPT", 0 if seen else 2**21)
    drawn = draw(gen, 45, seen=seen, heads=(1, 1), delta=delta, sizes=(64, 64)).to(torch.float32, torch.float32, DEVICE)
    do = torch.randn(drawn.tensors["v"].shape, generator=gen).to(DEVICE)

    def told(implementation, tensors):
        x = log_linear_inputs_of(tensors, scale=0.3, segments=Segments(1, 45), seen=tuple(seen or [0]))
        summary, partial = implementation.summarize(x, True)
        kept = implementation.finish(x, partial, Pending(lambda: None))[2]
        return summary.state, summary.transition, implementation.summarize_grad(x, kept, do.to(x.v.dtype), True)[0]

    wanted = told(LogLinearOp(), {name: x.double() for name, x in drawn.tensors.items()})
    got = told(delta_op.TritonLogLinearDelta() if delta else op.TritonLogLinear(), drawn.tensors)
    assert all(error(a.double(), b) < 2e-6 for a, b in zip(got, wanted, strict=True) if b.abs().max() > 0)
    assert all(a.shape == b.shape for a, b in zip(got, wanted, strict=True))


def test_padding_that_is_longer_than_levels_address_changes_nothing(gen):
    """As a rank has it: a fragment of its own, of noise, whose outputs nobody reads."""
    drawn = draw(gen, 60, levels=4, heads=(1, 1), sizes=(64, 64)).to(torch.float32, torch.float32, DEVICE)
    do = torch.randn(drawn.tensors["v"].shape, generator=gen).to(DEVICE) * (torch.arange(60) < 8)[:, None, None].to(
        DEVICE
    )

    def grads(tokens, offsets):
        tensors = {name: x[:, :tokens] for name, x in drawn.tensors.items()}
        segments, seen = Segments(1, tokens, torch.tensor(offsets)), (0,) * (len(offsets) - 1)
        x = log_linear_inputs_of(tensors, scale=0.3, segments=segments, seen=seen)
        implementation = op.TritonLogLinear()
        kept = implementation.finish(x, implementation.summarize(x, False)[1], Pending(lambda: None))[2]
        partial = implementation.summarize_grad(x, kept, do[:, :tokens], False)[1]
        return implementation.finish_grad(x, kept, partial, Pending(lambda: None)).of

    wanted, got = grads(8, [0, 8]), grads(60, [0, 8, 60])
    assert all(torch.equal(got[name][:, :8], wanted[name]) for name in wanted)


DELTA_CASES = {
    "grouped heads, in two parts, wide values": {"tokens": 70, "batch": 2, "heads": (1, 2), "sizes": (6, 72)},
    "initial slots in documents": {
        "tokens": 160,
        "offsets": [0, 1, 1, 135, 160],
        "seen": [7, 12, 130, 64],
        "heads": (1, 1),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DELTA_CASES)
def test_delta_rule_equals_the_definition(gen, case, dtype, monkeypatch):
    monkeypatch.setattr(delta_op, "AT_ONCE", 140)
    if case != "initial slots in documents" and dtype == torch.float16 and not GPU:
        pytest.skip("one case is enough in the interpreter")
    found = errors(gen, draw(gen, delta=True, **DELTA_CASES[case]), dtype)
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    assert max(found.values()) < tolerance, found


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_delta_rule_with_gates_that_close(gen):
    """Decays are differences of two sums of gates, each rounded by half an eps of itself."""
    drawn = draw(gen, 70, delta=True, heads=(1, 1))
    decay = drawn.tensors["decay"] = -100 * torch.rand(drawn.tensors["decay"].shape, generator=gen).double()
    found = errors(gen, drawn, torch.float32)
    assert max(found.values()) < torch.finfo(torch.float32).eps * decay.abs().sum(), found


def test_delta_rule_without_gates(gen):
    drawn = draw(gen, 70, delta=True, heads=(1, 1))
    del drawn.tensors["decay"]
    found = errors(gen, drawn, torch.float32)
    assert max(found.values()) < 2e-6, found


def test_refuses_a_delta_rule_with_wide_keys(gen):
    drawn = draw(gen, 3, delta=True, sizes=(256, 8)).to(torch.float32, torch.float32, DEVICE)
    expected = (
        "backend: got 'triton', expected 'auto' or 'reference' for a delta rule with keys of 256: Triton takes at"
    )
    with pytest.raises(ValueError, match=expected):
        log_linear_delta_rule(**drawn.tensors, backend="triton")


def test_other_lengths_and_documents_compile_nothing_anew():
    """Once there have been initial slots, and none: see log_linear_launches."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.log_linear_launches"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in done.stdout.splitlines()]
    for without, with_slots, *others in (calls[: len(calls) // 2], calls[len(calls) // 2 :]):
        assert without and with_slots and not any(others), others
