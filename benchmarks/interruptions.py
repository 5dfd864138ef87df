"""Interrupts runs of `lasp train` at random moments and compares where they end with a run that nobody interrupted.

    python benchmarks/interruptions.py --at-once 10                        50 times each, over 2 and 4 ranks
    python benchmarks/interruptions.py --trials rank launcher+term --times 1 --ranks 2

rank      a random rank is killed (SIGKILL); the launcher starts all of them again
all       all ranks are
launcher  is killed, and its ranks are to die with it; then it is started again
term      it gets SIGTERM: the run is to save the step that it is at and end with the exit code 75; then it goes on

A trial is one run, from its start to its end, with an interruption of each kind that it names, in any order. Moments
are spread over starts, steps and saves, of which every second step makes one. At the end every tensor of the last
checkpoint, weights and states of the optimiser, must have the bits of the uninterrupted run's.
"""

import random
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
import tyro
from launches import Failed, Launch, last_step, records, wait_for_end, write_data

from lasp.training.checkpoint import require_latest
from lasp.training.metrics import RESUMED
from lasp.training.stop import EXIT_CODE

DATA = "--context-length 64 --batch-contexts 4 --data.eval-contexts 4"
OFTEN = "--eval-every 7 --checkpoint-every 2"


@dataclass(frozen=True, kw_only=True)
class Settings:
    trials: tuple[str, ...] = ("rank+all+launcher+term",)
    times: int = 50
    ranks: tuple[int, ...] = (2, 4)
    steps: int = 12
    at_once: int = 1  # trials beside one another
    seconds: float = float("inf")  # after which no more trials begin
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    fsdp: bool = True
    checkpoint_async: bool = False
    seed: int | None = None  # of the moments

    @property
    def options(self) -> str:
        way = f"--steps {self.steps} --dtype {self.dtype} --parallel.{'' if self.fsdp else 'no-'}fsdp"
        return f"{DATA} {OFTEN} {way} --{'' if self.checkpoint_async else 'no-'}checkpoint-async"


def interrupt(kind: str, launch: Launch, settings: Settings, draw: random.Random) -> bool:
    """One interruption; whether the launcher has to be started again."""
    processes = launch.ranks()
    if kind in ("rank", "all"):
        launch.send(
            signal.SIGKILL, *draw.sample(processes, min(1 if kind == "rank" else len(processes), len(processes)))
        )
        wait_for_end(processes)
        launch.began = len(records(launch.run))
        return False
    if kind == "launcher":
        launch.send(signal.SIGKILL, launch.process.pid)
        launch.wait()
        wait_for_end(processes)
        return True
    if kind == "term":
        launch.send(signal.SIGTERM, launch.process.pid)
        code, taken = launch.wait(), last_step(records(launch.run)[launch.began :])
        if code == 0:
            return False
        if code != EXIT_CODE and 0 < taken < settings.steps:
            raise Failed(f"exit code {code} after step {taken}")
        if taken > 0 and (saved := require_latest(launch.run).name) != f"step-{taken:08d}":
            raise Failed(f"{saved} was saved after step {taken}")
        return True
    raise SystemExit(f"trials: got {kind!r}, expected rank, all, launcher or term")


def place(launch: Launch) -> str:
    """Where a run is."""
    if last_step(records(launch.run)[launch.began :]) == 0:
        return "start"
    return "save" if any(launch.run.glob("checkpoints/unfinished-*")) else "step"


@dataclass(frozen=True)
class Straight:
    """A run that nobody interrupted: where it ended, and the seconds that it took to its first step and for each."""

    tensors: dict[str, torch.Tensor]
    start: float
    step: float

    @classmethod
    def of(cls, run: Path, ranks: int, settings: Settings) -> "Straight":
        began = time.monotonic()
        launch = Launch(run, ranks, settings.options)
        launch.wait_for_step(1)
        stepped = time.monotonic()
        if launch.wait() != 0:
            raise SystemExit(run.with_suffix(".log").read_text())
        return cls(saved_tensors(run), stepped - began, (time.monotonic() - stepped) / settings.steps)


def trial(
    kinds: list[str], run: Path, ranks: int, settings: Settings, straight: Straight, draw: random.Random
) -> list[tuple[str, str]]:
    """One run with these interruptions; what they were, and where. Raises Failed if it does not end well."""
    launch, came = Launch(run, ranks, settings.options), []
    moments = sorted(draw.randrange(settings.steps) for _ in kinds)  # 0: in its start
    try:
        for kind, reached in zip(draw.sample(kinds, len(kinds)), moments, strict=True):
            if reached > 0 and not launch.wait_for_step(reached):
                break  # the moment came too late: the run is at its end
            time.sleep(draw.uniform(0, 2 * straight.step if reached > 0 else 1.2 * straight.start))
            came.append((kind, place(launch)))
            if interrupt(kind, launch, settings, draw):
                launch = Launch(run, ranks, settings.options)
        if (code := launch.wait()) != 0:
            raise Failed(f"exit code {code}")
    finally:
        launch.end()
    require_same(saved_tensors(run), straight.tensors)
    return came


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    path = require_latest(run)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in entries.items() if hasattr(m, "size")}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def require_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    if differing := [name for name in wanted if name not in got or not torch.equal(got[name], wanted[name])]:
        raise Failed(f"{len(differing)} tensors differ, the first {differing[0]}")


@dataclass
class Tally:
    """How the trials of one kind over a number of ranks have ended so far."""

    ended: int = 0
    well: int = 0
    resumed: int = 0
    came: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        came, places = (", ".join(f"{n} {what}" for what, n in c.items()) for c in (self.came, self.places))
        return (
            f"{self.well} of {self.ended} end with the bits of the uninterrupted run; interrupted by {came} "
            f"in {places}; they went on from a checkpoint {self.resumed} times"
        )


def main(settings: Settings) -> None:
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    print(f"moments: --seed {seed}", flush=True)
    until = time.monotonic() + settings.seconds
    tallies = {(ranks, kinds): Tally() for ranks in settings.ranks for kinds in settings.trials}
    with TemporaryDirectory() as name, ThreadPoolExecutor(settings.at_once) as pool:
        folder = Path(name)
        write_data(folder)
        uninterrupted = pool.map(
            lambda ranks: Straight.of(folder / f"straight-{ranks}", ranks, settings), settings.ranks
        )
        straight = dict(zip(settings.ranks, uninterrupted, strict=True))

        def attempt(ranks: int, kinds: str, number: int) -> None:
            if time.monotonic() > until:
                return
            run, tally = folder / f"{kinds}-{ranks}-{number}", tallies[ranks, kinds]
            draw = random.Random(f"{seed}-{run.name}")
            try:
                for kind, where in trial(kinds.split("+"), run, ranks, settings, straight[ranks], draw):
                    tally.came[kind] += 1
                    tally.places[where] += 1
                tally.well += 1
            except (Failed, ValueError) as error:
                print(f"{run.name}: {error}\n{run.with_suffix('.log').read_text()}", flush=True)
            tally.ended += 1
            tally.resumed += sum(RESUMED in row for row in records(run))
            print(f"{ranks} ranks, {kinds}: {tally}", flush=True)
            shutil.rmtree(run)

        for each in [pool.submit(attempt, *of, number) for number in range(settings.times) for of in tallies]:
            each.result()
    sys.exit(any(tally.well < tally.ended for tally in tallies.values()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
