"""Times operators and training steps on the ranks there are; benchmarks/scaling.sh runs it on 1, 2, 4 and 8 and draws.

    torchrun --nproc-per-node 2 benchmarks/scaling.py --output runs/scaling                all of it
    torchrun --nproc-per-node 2 benchmarks/scaling.py --output runs/scaling --ops scalar --models --modes weak

Weak scaling keeps the tokens of a rank, strong scaling those of the sequence. Forward and backward, zigzag; operators
are replayed from CUDA graphs, where only the GPU's time counts, but for softmax attention and the peer's; a training
step is that of `lasp train`, FSDP and recomputation of layers included. A run is one call, or as many in a row as take
50 ms, so that ranks' uneven starts do not count; of every run the slowest rank counts, and the median of the runs is
told. A row is added to points.csv as soon as it is measured, and points that are there are not measured again. What
fails leaves a row without a time and ends its rank, since the others may be waiting for it, so that torchrun ends them
all: the same command goes on with the next point.
"""

import csv
import functools
import gc
import os
import statistics
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Literal, NoReturn, get_args

import exchange as ops
import simulate
import torch
import torch.distributed as dist
import tyro
from clock import Clock
from ranks import join
from steps import Trainer
from torch import Tensor
from watch import Watched

from lasp.config import SOFTMAX
from lasp.kernels import delta_rule, linear_attention
from lasp.models import flops_per_token, linear_llama3_1b, tiny
from lasp.parallel import leave
from lasp.parallel.cost import Message
from lasp.parallel.exchange import Auto
from lasp.parallel.topology import topology

Op = Literal["scalar", "diagonal", "gated delta", "softmax"]
Exchange = Literal["all_gather", "symmetric_memory", "scan", "ring"]
Mode = Literal["weak", "strong"]
ALONE = "without"  # the same local tokens on a rank that exchanges nothing
NO_ROOM = "no room"


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path = Path("runs/scaling")
    ops: tuple[Op, ...] = get_args(Op)
    models: tuple[str, ...] = ("L", "LLLN")  # patterns of Linear-Llama3-1B, or of a tiny model on a CPU
    modes: tuple[Mode, ...] = get_args(Mode)
    exchanges: tuple[Exchange, ...] = get_args(Exchange)
    tokens: int = 65536  # of a rank, weak scaling
    sequence: int = 524288  # of all ranks, strong scaling
    heads: int = 16
    head_dim: int = 128
    runs: int = 5  # of a point, or as many as end within `seconds`, but at least one
    seconds: float = 10.0
    peer: bool = True  # flash-linear-attention's context parallelism, if it is installed


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row. work: FLOPs of a rank, but for a factor that a case's points share. Times in seconds for one call."""

    mode: str
    case: str
    exchange: str
    ranks: int
    tokens: int  # of a rank
    work: float
    predicted_exchange: float | None = None  # all exchanges of states of a call, none of them hidden, by the simulator
    seconds: float | None = None
    peak_bytes: float | None = None
    softmax_share: float | None = None  # of a training step's time
    note: str = ""  # why there is no time

    @property
    def key(self) -> tuple:
        return self.mode, self.case, self.exchange, self.ranks, self.tokens


def read(file: Path) -> list[Point]:
    """The rows of a file, none if there is no such file."""
    if not file.exists():
        return []
    words = {"mode", "case", "exchange", "note"}

    def value(name: str, text: str) -> object:
        if name in words:
            return text
        return (int if name in ("ranks", "tokens") else float)(text) if text else None

    with file.open(newline="") as lines:
        return [Point(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(lines)]


def append(file: Path, point: Point) -> None:
    new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Point)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(point))


class FewRuns(Clock):
    """Takes its time with calls that are short, and little of it with those that are long."""

    RUN = 0.05  # seconds of a run, if calls are shorter than that

    def __init__(self, device: torch.device, runs: int, seconds: float):
        super().__init__(device, runs)
        self.seconds = seconds

    def median(self, call: Watched, graph: bool) -> float:
        """Seconds of a call: it is made twice, and then as often as fits, if wanted in a CUDA graph; the second counts
        if none does."""
        self._slowest(call)
        second = self._slowest(call)
        times = max(1, int(self.RUN / second))
        runs = min(self.runs, int(self.seconds / (second * times)))
        if graph and self.device.type == "cuda":
            replay = self._capture(call.call, times, torch.cuda.graph_pool_handle()).replay
            return statistics.median([self._slowest(replay) / times for _ in range(1 + runs)][1:] or [second])
        return statistics.median([self._slowest(call, times) for _ in range(runs)] or [second])

    def _slowest(self, call: Callable[[], object], times: int = 1) -> float:
        """Seconds of a call, of so many in a row."""
        seconds = torch.tensor(self._once(call, times) / times, device=self.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds.item())


class Points:
    """The rows of this world. Rank 0 writes them, but those of a failure the rank that failed."""

    def __init__(self, settings: Settings, clock: FewRuns):
        self.file, self.clock, self.ranks = settings.output / "points.csv", clock, dist.get_world_size()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.done = {point.key for point in read(self.file)}
        dist.barrier()  # before anybody writes

    def measure(self, point: Point, make: Callable[[], Watched], graph: bool = False) -> None:
        """make: gives the call; it may fail, as the call may. graph: it is captured, on a GPU."""
        if point.key in self.done:
            return
        try:
            call = make()
            point = replace(
                point, seconds=self.clock.median(call, graph), peak_bytes=call.peak_bytes(), softmax_share=call.share()
            )
        except Exception as error:
            traceback.print_exc()
            full = "out of memory" in str(error).lower()  # the allocator's error, or NCCL's, or the driver's
            self._fail(replace(point, note=NO_ROOM if full else type(error).__name__))
        if dist.get_rank() == 0:
            self._write(point)
        del call
        gc.collect()  # models hold themselves
        if self.clock.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fail(self, point: Point) -> NoReturn:
        """Leaves the row, unless another rank did, whose end is what this one failed of."""
        if point.key not in {there.key for there in read(self.file)}:
            self._write(point)
        os._exit(1)  # an orderly end would wait for collectives that the others may be in

    def _write(self, point: Point) -> None:
        append(self.file, point)
        took = point.note or f"{1e3 * (point.seconds or 0):.3f} ms"
        print(point.mode, point.case, point.exchange, f"{point.ranks} x {point.tokens} tokens:", took, flush=True)


@dataclass(frozen=True)
class Exchanges:
    """What the simulator says of exchanges of two units a rank, of a layer's heads."""

    heads: int
    key_dim: int
    value_dim: int
    transition: int  # numbers of a head's

    def seconds(self, name: str, forwards: int, backwards: int) -> float | None:
        """Of so many exchanges; None for one rank, or for what is not simulated."""
        ranks, unit = dist.get_world_size(), 2 * 4 * self.heads
        state, transition = unit * self.key_dim * self.value_dim, unit * self.transition
        costs, _ = _topology()
        if name == "auto":
            there = ops.parallel("auto").exchange
            name = there.fastest(Message(state, transition, ways=2)) if isinstance(there, Auto) else "all_gather"
        if ranks == 1 or name not in simulate.SCHEDULES:
            return None
        play, node = simulate.SCHEDULES[name], int(os.environ["LOCAL_WORLD_SIZE"])
        again = transition if name == "symmetric_memory" else 0  # the others keep transitions for backward
        forward, backward = (Message(state, extra, ways=2) for extra in (transition, again))
        return forwards * play(costs, forward, ranks, node) + backwards * play(costs, backward, ranks, node)


@functools.cache
def _topology():
    return topology(dist.group.WORLD)


def measure_op(settings: Settings, points: Points, mode: Mode, op: Op, tokens: int) -> None:
    ranks, device, size = points.ranks, points.clock.device, settings.head_dim

    def measure(exchange: str, function: Callable[..., Tensor], work: float = tokens, predicted: float | None = None,
                graph: bool = True) -> None:  # fmt: skip
        def make() -> Watched:
            tensors = ops.draw(op, tokens, ops.Settings(heads=settings.heads, head_dim=size), device)
            return Watched(ops.forward_backward(function, tensors), device)

        point = Point(
            mode=mode, case=op, exchange=exchange, ranks=ranks, tokens=tokens, work=work, predicted_exchange=predicted
        )
        points.measure(point, make, graph)

    if op == "softmax":
        measure("ring", ops.parallel("all_gather").sequence(tokens * ranks).softmax_attention, tokens * tokens * ranks,
                graph=False)  # fmt: skip
        return
    delta = op == "gated delta"
    measure(ALONE, output_of(delta_rule if delta else linear_attention))
    if ranks == 1:
        return
    exchanges = Exchanges(settings.heads, size, size, {"scalar": 1, "diagonal": size, "gated delta": size**2}[op])
    for name in settings.exchanges:
        sequence = ops.parallel(name).sequence(tokens * ranks)
        function = output_of(sequence.delta_rule if delta else sequence.linear_attention)
        measure(name, function, predicted=exchanges.seconds(name, 1, 1))
    if delta and settings.peer and device.type == "cuda" and (peer := ops.peer(tokens)) is not None:
        measure("flash-linear-attention", peer, graph=False)


def output_of(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Tensor]:
    return lambda **tensors: function(**tensors)[0]


def measure_model(pattern: str, points: Points, lengths: dict[Mode, int]) -> None:
    device, ranks = points.clock.device, points.ranks
    model = linear_llama3_1b(pattern=pattern) if device.type == "cuda" else tiny(pattern=pattern)
    trainer = functools.cache(functools.partial(Trainer, model, device))  # made when first needed
    linear = sum(layer != SOFTMAX for layer in model.layers)
    exchanges = Exchanges(model.num_heads, model.key_dim, model.value_dim, model.key_dim**2)  # of Gated DeltaNet
    for mode, tokens in lengths.items():
        point = Point(
            mode=mode,
            case=f"model {pattern}",
            exchange="auto",
            ranks=ranks,
            tokens=tokens,
            work=flops_per_token(model, tokens * ranks) * tokens,
            predicted_exchange=exchanges.seconds("auto", 2 * linear, linear),  # recomputation exchanges again
        )
        points.measure(point, lambda tokens=tokens: trainer().step(tokens))


def main(settings: Settings) -> None:
    points = Points(settings, FewRuns(join(), settings.runs, settings.seconds))
    whole: dict[Mode, int] = {"weak": settings.tokens, "strong": settings.sequence // points.ranks}
    lengths = {mode: whole[mode] for mode in settings.modes}
    for (mode, tokens), op in product(lengths.items(), settings.ops):
        measure_op(settings, points, mode, op, tokens)
    for pattern in settings.models:
        measure_model(pattern, points, lengths)
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
