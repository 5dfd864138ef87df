"""Measures what training steps take of memory and time for each policy of recomputation, beside what `lasp plan` says.

    torchrun --nproc-per-node 1 benchmarks/memory.py                 Linear-Llama3-1B, pure, 16K to 1M tokens
    torchrun --nproc-per-node 2 benchmarks/memory.py --pattern LLLN --tokens 65536 --ways full "full offloaded"

A step is that of `lasp train`, FSDP and AdamW, on one sequence over all ranks; the peak is that of the rank that took
most. What does not fit is a row that says so; on several ranks it ends them all. "off" is how far the plan is from what
was measured. On a CPU models are tiny, and memory is not measured.
"""

import gc
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.distributed as dist
import tyro
from ranks import join, machine, say
from scaling import FewRuns
from steps import Trainer

from lasp.models import PRESETS
from lasp.parallel import leave
from lasp.plan import GPUS, Job, Plan, Setting, named, of_device, plan, recomputation
from lasp.plan.gpus import GIB, GPU

Way = Literal["none", "selective", "selective offloaded", "full", "full offloaded", "auto", "auto offloaded"]
COLUMNS = (
    "tokens",
    "way",
    "GiB",
    "planned GiB",
    "GiB off",
    "ms",
    "planned ms",
    "ms off",
    "tokens/s",
    "planned on host",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None  # a preset; Linear-Llama3-1B, or a tiny model on a CPU
    pattern: str = "L"
    mixer: str = "gated_delta_net"
    tokens: tuple[int, ...] = (16_384, 65_536, 262_144, 524_288, 1_048_576)  # of the context, over all ranks
    ways: tuple[Way, ...] = get_args(Way)
    runs: int = 3  # of a step, or as many as end within `seconds`; the second, if none does
    seconds: float = 10.0
    measure: bool = False  # the GPU's speed, for the plan, instead of what is listed of it


def main(settings: Settings) -> None:
    clock = FewRuns(join(), settings.runs, settings.seconds)
    gpu = _gpu(clock.device, settings.measure)
    say(f"{machine()}\nthe plan's: {gpu}\n")
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        say(f"| {' | '.join(cells)} |")
    for tokens in settings.tokens:
        for way in settings.ways:
            say(f"| {' | '.join(_row(settings, clock, gpu, tokens, way))} |")
    leave()


def _gpu(device: torch.device, measure: bool) -> GPU:
    if device.type == "cpu":
        return GPUS["H200"]
    return named("here") if measure else of_device(device)


def _row(settings: Settings, clock: FewRuns, gpu: GPU, tokens: int, way: str) -> list[str]:
    policy, _, offloaded = way.partition(" ")
    ranks, cuda = dist.get_world_size(), clock.device.type == "cuda"
    name = settings.model or ("linear_llama3_1b" if cuda else "tiny")
    job = Job(
        model=PRESETS[name](mixer=settings.mixer, pattern=settings.pattern),
        context=tokens,
        gpu=gpu,
        gpus=ranks,
        half=2 if cuda else 4,
    )
    setting = Setting(sequence_parallel=ranks, offload_activations=bool(offloaded))
    setting = recomputation(job, setting) if policy == "auto" else replace(setting, recompute=policy)
    if setting.recompute_layers is not None:
        way = f"{way}: {setting.recompute_layers} {setting.recompute}"
    made, cells, measured = plan(job, setting), [f"{tokens:,}", way], None
    try:
        measured = _measure(clock, made)
    except torch.OutOfMemoryError:
        if ranks > 1:
            raise  # the others wait for this one
    _free(cuda)
    if measured is None:
        return [*cells, "no room", f"{made.memory.total / GIB:.1f}", *[""] * (len(COLUMNS) - 4)]
    peak, seconds = measured
    return [
        *cells,
        *(["", f"{made.memory.total / GIB:.1f}", ""] if peak is None else _beside(peak / GIB, made.memory.total / GIB)),
        *_beside(1e3 * seconds, 1e3 * made.seconds),
        f"{tokens / seconds:,.0f}",
        f"{made.memory.host / GIB:.1f}",
    ]


def _measure(clock: FewRuns, made: Plan) -> tuple[int | None, float]:
    """Peak bytes of a GPU, and seconds of a step."""
    setting = made.setting
    trainer = Trainer(
        made.job.model,
        clock.device,
        recompute=setting.recompute,
        recompute_layers=setting.recompute_layers,
        offload_activations=setting.offload_activations,
    )
    step = trainer.step(made.job.context // made.job.gpus)
    seconds = clock.median(step, graph=False)
    return step.peak_bytes(), seconds


def _beside(measured: float, planned: float) -> list[str]:
    return [f"{measured:,.1f}", f"{planned:,.1f}", f"{planned / measured - 1:+.1%}"]


def _free(cuda: bool) -> None:
    gc.collect()  # models hold themselves
    torch.compiler.reset()  # or what is compiled for the next policy would serve both
    if cuda:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
