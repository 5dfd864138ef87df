"""Where the time of a few steps goes: `lasp train --profile`.

    RUN_DIR/profile/rank-0.json    a trace of three steps for chrome://tracing or ui.perfetto.dev
    RUN_DIR/profile/rank-0.txt     the same as tables: phases and layers first, then kernels and operations

Phases of a step are ranges in the trace (`read`, `forward`, `backward`, `optimizer`), and so are layers, forward and
backward. The first two steps of a start are left out: they compile, and make buffers.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

BEFORE, STEPS = 2, 3
PHASES = ("read", "forward", "backward", "optimizer", "evaluate")
ROWS = 40  # of the tables of kernels and operations


@contextmanager
def profiling(run_dir: str, rank: int, model: nn.Module, wanted: bool) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step. Writes the files of this rank, if that is wanted."""
    if not wanted:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    when = schedule(wait=BEFORE - 1, warmup=1, active=STEPS, repeat=1)
    with (
        ranges_of_layers(model),
        profile(
            activities=activities, schedule=when, on_trace_ready=partial(_write, Path(run_dir) / "profile", rank)
        ) as profiler,
    ):
        yield profiler.step


@contextmanager
def ranges_of_layers(model: nn.Module) -> Iterator[None]:
    """Inside it each of `model.layers` is a range, forward and backward."""
    handles = []
    for index, layer in enumerate(model.get_submodule("layers").children()):
        forward, backward = _Range(f"layer {index} forward"), _Range(f"layer {index} backward")
        handles += [
            layer.register_forward_pre_hook(partial(_enter, forward, backward)),
            # Also where recomputation ends a layer by an exception, as soon as it has what it needs.
            layer.register_forward_hook(partial(_leave, forward, backward), always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Range:
    """A range that begins and ends in calls of different functions."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[record_function] = []

    def begin(self) -> None:
        self._open.append(record_function(self._name))
        self._open[-1].__enter__()

    def end(self) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)


def _enter(forward: _Range, backward: _Range, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    forward.begin()
    if isinstance(inputs[0], Tensor) and inputs[0].requires_grad:
        inputs[0].register_hook(lambda _: backward.end())


def _leave(forward: _Range, backward: _Range, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    forward.end()
    x = output[0] if isinstance(output, tuple) else output
    if isinstance(x, Tensor) and x.requires_grad:
        x.register_hook(lambda _: backward.begin())


def _write(folder: Path, rank: int, profiler: profile) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"rank-{rank}.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "dur" in event]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation" and _is_ours(event["name"])]
    host, device = _totals(events, "user_annotation"), _totals(events, "gpu_user_annotation")
    lines = [f"{'milliseconds a step':24}{'host':>12}{'device':>12}{'calls':>8}"]
    for name, calls in sorted(Counter(ranges).items(), key=lambda each: _place(each[0])):
        lines.append(f"{name:24}{host[name]:12.3f}{device[name]:12.3f}{calls / STEPS:8.0f}")
    for title, category in (("kernels", "kernel"), ("operations, those inside others counted twice", "cpu_op")):
        lines += ["", f"milliseconds a step: {title}"]
        lines += [f"{took:12.3f}  {name}" for name, took in _totals(events, category).most_common(ROWS)]
    (folder / f"rank-{rank}.txt").write_text("\n".join(lines) + "\n")


def _is_ours(name: str) -> bool:
    return name in PHASES or name.startswith("layer ")


def _place(name: str) -> tuple[int, int, bool]:
    """Of a range in the table: phases, then layers, forward before backward."""
    if name in PHASES:
        return 0, PHASES.index(name), False
    return 1, int(name.split()[1]), name.endswith("backward")


def _totals(events: list[dict[str, Any]], category: str) -> Counter[str]:
    """Milliseconds a step, by name."""
    took: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == category:
            took[event["name"]] += event["dur"] / 1000 / STEPS
    return took
