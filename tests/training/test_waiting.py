"""The host does not wait for the device between steps whose numbers are logged, and what it does not know yet does no
harm."""

import math
import traceback
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lasp.models import tiny
from lasp.training import reading, train
from lasp.training.metrics import read_metrics
from lasp.training.native import NativeEngine
from tests.cuda_waits import require_no_cuda_waits
from tests.training.test_train import saved_tensors

WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
EXEMPT = {
    *(("checks.py", "decay"), ("loss.py", "require_ids")),  # they look at values where that costs no wait
    *(("batches.py", "scored"), ("conv.py", "_convolved")),  # these at tensors that are on the host anyway
}
OF_THE_HOST = {"device_mesh.py", "segments.py"}  # and all of these


class Waits(TorchFunctionMode):
    """By how many steps were done: what asked for numbers of the device's tensors, outside of `exempt` functions."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.paused, self.seen = 0, 0, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if not self.paused and getattr(function, "__name__", "") in WAITS:
            frames = [(frame.filename.rpartition("/")[2], frame.name) for frame in traceback.extract_stack()]
            if not (EXEMPT & set(frames) or OF_THE_HOST & {file for file, _ in frames}):
                self.seen.setdefault(self.steps, []).append((function.__name__, frames[-4:]))
        return function(*args, **(kwargs or {}))

    def exempt(self, function):
        def call(*args, **kwargs):
            self.paused += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.paused -= 1

        return call


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("fsdp", [False, True])
def test_no_number_is_asked_for_between_logged_steps(config, monkeypatch, experts, fsdp):
    model = replace(tiny(), vocab_size=257, num_experts=experts, expert_intermediate_size=16 if experts else None)
    config = replace(
        config, model=model, steps=9, log_every=4, eval_every=9, checkpoint_every=9, compare_replicas_every=0
    )
    config = replace(config, parallel=replace(config.parallel, fsdp=fsdp))
    waits, add = Waits(), reading.Reader.add
    monkeypatch.setattr(reading, "PERIOD", math.inf)
    monkeypatch.setattr(train, "read", waits.exempt(train.read))  # what is read is on the host
    monkeypatch.setattr("lasp.kernels.experts.grouped_matmul", waits.exempt(_by_expert))  # on GPUs it is a kernel

    def added(self, step):
        add(self, step)
        waits.steps = step.number

    monkeypatch.setattr(reading.Reader, "add", added)
    with waits:
        train.train(config)
    assert {4, 8} <= waits.seen.keys() or {5, 9} <= waits.seen.keys(), "what logging asks for is not seen"
    assert not [seen for steps, seen in waits.seen.items() if steps in (2, 3, 6, 7)]
    assert [r["step"] for r in read_metrics(config.run_dir) if "loss" in r] == list(range(1, 10))


def _by_expert(x, weights, counts):
    parts = x.split(counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
@pytest.mark.parametrize(
    "kind",
    ["reference", "plain", "fsdp", "bfloat16", "experts", "segments", "recomputed", "curriculum", "kda", "log_linear"],
)
def test_cuda_sees_no_wait_between_logged_steps(config, monkeypatch, kind):
    mixers = {"kda": "kda", "log_linear": "log_linear_gated_delta_net"}
    heads = 8 if kind == "reference" else 32  # of 32 there are kernels
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_intermediate_size": 16} if kind == "experts" else {}
    config = replace(
        config,
        model=replace(
            config.model, head_dim=heads, value_head_dim=heads, mixer=mixers.get(kind, "gated_delta_net"), **experts
        ),
        device="cuda",
        dtype="bfloat16" if kind == "bfloat16" else "float32",
        steps=9,
        log_every=4,
        eval_every=9,
        checkpoint_every=9,
        parallel=replace(config.parallel, fsdp=kind in ("fsdp", "bfloat16")),
        segment_tokens=25 if kind == "segments" else None,
        recompute="full" if kind == "recomputed" else "none",
        curriculum=("32:3",) if kind == "curriculum" else (),
    )
    require_no_cuda_waits(config, monkeypatch)


def test_steps_after_one_that_cannot_be_taken_change_nothing(config, monkeypatch):
    """They are begun before anybody knows of it."""
    engines, done, plain = [], [], NativeEngine.backward

    def backward(self, loss):
        plain(self, loss)
        done.append(loss)
        engines.append(self)
        if len(done) == 5:  # the third step's first context
            next(self.model.parameters()).grad[0] = math.nan

    monkeypatch.setattr(reading, "PERIOD", math.inf)
    whole = replace(config, steps=2, run_dir=f"{config.run_dir}-whole")
    config = replace(config, eval_every=6, checkpoint_every=6)
    monkeypatch.setattr("lasp.training.train.learning_rate", lambda *_: 1e-2)  # of as many steps as there are
    train.train(whole)
    monkeypatch.setattr(NativeEngine, "backward", backward)
    with pytest.raises(FloatingPointError, match="^step 3, contexts 4 to 5: gradient norm: got nan"):
        train.train(config)
    assert len(done) >= 12, "the steps that follow were not begun"
    saved = saved_tensors(whole.run_dir)
    for name, weight in engines[-1].model.state_dict().items():
        assert torch.equal(saved[f"model.{name}"], weight), name
    assert [r["step"] for r in read_metrics(config.run_dir) if "loss" in r] == [1, 2]
