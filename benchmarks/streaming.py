"""Times whole training steps on one long sequence in segments, as `lasp train --segment-tokens` makes them, with AdamW.

    python benchmarks/streaming.py --tokens 1048576 8388608 --segment-tokens 65536         on one GPU
    torchrun --nproc-per-node 2 benchmarks/streaming.py --tokens 16777216 --segment-tokens 131072
    python benchmarks/streaming.py --pattern LLLLLLLN --tokens 1048576 --segment-tokens 65536 --offload
    python benchmarks/streaming.py --tokens 65536 --segment-tokens 0                       beside it, without segments
    python benchmarks/streaming.py --tokens 1048576 --segment-tokens 0 --recompute full --offload-activations

Each number of tokens is one row of a table and one line of JSON. A step on two segments (without them a whole one)
comes first, for what is compiled in it, and then one measured step, or the median of `--runs`. MFU counts the model's
own FLOPs, forward and backward, against the dense bf16 peak that the GPU's vendor states. Peak GPU memory is that of
the rank that took most, host memory what was taken of this machine's since the start. On a CPU the preset is tiny.
"""

import json
import threading
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist
import tyro
from clock import Clock
from ranks import join, machine, say
from steps import Trainer

from lasp.config import MIXERS
from lasp.models import PRESETS
from lasp.models.recompute import Policy
from lasp.parallel import leave
from lasp.plan.host import available_bytes
from lasp.training.metrics import model_flop_utilisation, peak_flops
from lasp.training.streaming import Segments

COLUMNS = ("model", "tokens", "segment", "s", "tokens/s", "MFU", "peak GPU GiB", "host GiB")


@dataclass(frozen=True, kw_only=True)
class Settings:
    preset: Literal[tuple(PRESETS)] = "linear_llama3_1b"  # type: ignore[valid-type]
    mixer: Literal[MIXERS] = "gated_delta_net"  # type: ignore[valid-type]
    pattern: str = "L"
    tokens: tuple[int, ...] = (1 << 20,)  # of the sequence, over all ranks
    segment_tokens: int = 1 << 16  # over all ranks; 0: the sequence in one piece
    graphs: int = 1  # so many segments at the end are computed once
    offload: bool = False  # what segments hand on to each other waits in the host's memory
    recompute: Policy = "none"  # of layers within a segment
    recompute_layers: int | None = None  # so many of them, the others the policy before it
    offload_activations: bool = False  # inputs of layers that are recomputed wait in the host's memory
    runs: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured. seconds: of a step."""

    model: str
    machine: str
    tokens: int
    segment_tokens: int
    graphs: int
    offload: bool
    recompute: str
    recompute_layers: int | None
    offload_activations: bool
    seconds: float
    tokens_per_second: float
    mfu: float | None
    peak_gpu_bytes: int | None
    host_bytes: int | None

    def cells(self) -> list[str]:
        return [
            self.model,
            f"{self.tokens:,}",
            f"{self.segment_tokens:,}",
            f"{self.seconds:,.2f}",
            f"{self.tokens_per_second:,.0f}",
            "" if self.mfu is None else f"{self.mfu:.1%}",
            "" if self.peak_gpu_bytes is None else f"{self.peak_gpu_bytes / 2**30:.1f}",
            "" if self.host_bytes is None else f"{self.host_bytes / 2**30:.1f}",
        ]


class HostMemory:
    """Looks again and again at what this machine has left, between `with` and its end."""

    def __init__(self) -> None:
        self.least: int | None = None

    def __enter__(self) -> "HostMemory":
        self._end = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._watcher.join()

    def _watch(self) -> None:
        while True:
            left = available_bytes()
            self.least = left if self.least is None else min(left, self.least)
            if self._end.wait(0.05):
                return

    def taken(self) -> int | None:
        return None if FIRST is None or self.least is None else max(0, FIRST - self.least)


def measure(trainer: Trainer, clock: Clock, settings: Settings, tokens: int) -> Row:
    ranks, memory = dist.get_world_size(), HostMemory()
    segments = Segments(settings.segment_tokens, settings.offload, settings.graphs) if settings.segment_tokens else None
    few = tokens if segments is None else min(tokens, 2 * segments.tokens)
    trainer.step(few // ranks, "SP", segments)()
    step = trainer.step(tokens // ranks, "SP", segments)
    with memory:
        (seconds,) = clock.medians({"step": step}).values()
    rate, peak = tokens / seconds, peak_flops(clock.device, trainer.config.dtype)
    flops = trainer.flops(tokens // ranks) * ranks / tokens
    return Row(
        model=f"{settings.preset if clock.device.type == 'cuda' else 'tiny'} {settings.pattern} {settings.mixer}",
        machine=machine(),
        tokens=tokens,
        segment_tokens=settings.segment_tokens,
        graphs=settings.graphs,
        offload=settings.offload,
        recompute=settings.recompute,
        recompute_layers=settings.recompute_layers,
        offload_activations=settings.offload_activations,
        seconds=seconds,
        tokens_per_second=rate,
        mfu=None if peak is None else model_flop_utilisation(flops, rate, ranks, peak),
        peak_gpu_bytes=step.peak_bytes(),
        host_bytes=memory.taken(),
    )


def main(settings: Settings) -> None:
    clock = Clock(join(), settings.runs, warm_ups=0)
    cuda = clock.device.type == "cuda"
    model = PRESETS[settings.preset if cuda else "tiny"](settings.mixer, settings.pattern)
    trainer = Trainer(
        model,
        clock.device,
        recompute=settings.recompute,
        recompute_layers=settings.recompute_layers,
        offload_activations=settings.offload_activations,
    )
    say(f"{machine()}\n")
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        say(f"| {' | '.join(cells)} |")
    rows: list[Row] = []
    try:
        for tokens in settings.tokens:
            rows.append(measure(trainer, clock, settings, tokens))
            say(f"| {' | '.join(rows[-1].cells())} |")
    finally:  # whatever was measured before memory ran out
        say("", *(json.dumps(asdict(row)) for row in rows), sep="\n")
    leave()


FIRST = available_bytes()  # before anything is on a GPU
if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
