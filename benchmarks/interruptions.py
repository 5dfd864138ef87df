"""Interrupts runs of `lasp train` at random moments and compares where they end with a run that nobody interrupted.

    python benchmarks/interruptions.py                                     50 times each, over 2 and 4 ranks
    python benchmarks/interruptions.py --trials rank+launcher+term --times 1 --ranks 2

rank      a random rank is killed (SIGKILL); the launcher starts all of them again
all       all ranks are
launcher  is killed, and its ranks are to die with it; then it is started again
term      it gets SIGTERM: the run is to save the step that it is at and end with the exit code 75; then it goes on

A trial is one run, from its start to its end, with an interruption of each kind that it names. Moments are spread over
starts, steps and saves, of which every second step makes one. At the end every tensor of the last checkpoint, weights
and states of the optimiser, must have the bits of the uninterrupted run's.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
import tyro

from lasp.data import TokenFileWriter
from lasp.training.checkpoint import require_latest
from lasp.training.metrics import METRICS_FILE, RESUMED
from lasp.training.stop import EXIT_CODE

ROOT = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds
MODEL = "--model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16 --context-length 64 --batch-contexts 4"
LOOP = "--device cpu --eval-every 7 --checkpoint-every 2 --checkpoint-keep 2 --optimizer.warmup-steps 1"


@dataclass(frozen=True, kw_only=True)
class Settings:
    trials: tuple[str, ...] = ("rank", "all", "launcher", "term")
    times: int = 50
    ranks: tuple[int, ...] = (2, 4)
    steps: int = 24
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    fsdp: bool = True
    checkpoint_async: bool = False
    seed: int | None = None  # of the moments


class Failed(Exception):
    pass


class Launch:
    """A launcher and its ranks, in a run's directory."""

    def __init__(self, run: Path, ranks: int, settings: Settings) -> None:
        self.run, self.began = run, len(records(run))
        data = f"--data.train {run.parent}/train --data.valid {run.parent}/valid --data.eval-contexts 4 --run-dir {run}"
        way = f"--steps {settings.steps} --dtype {settings.dtype} --parallel.{'' if settings.fsdp else 'no-'}fsdp"
        way += f" --{'' if settings.checkpoint_async else 'no-'}checkpoint-async"
        command = [sys.executable, str(ROOT / "launch/elastic.py"), str(ranks), "-m", "lasp.cli", "train", "quickstart"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.log = open(run.with_suffix(".log"), "a")  # noqa: SIM115 (closed by wait)
        self.process = subprocess.Popen(
            [*command, *f"{MODEL} {LOOP} {data} {way}".split()],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=self.log,
        )

    def wait_for_step(self, step: int) -> bool:
        """Whether the run came to a step before it ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            if last_step(records(self.run)[self.began :]) >= step:
                return True
            if time.monotonic() > deadline:
                self.end()
                raise Failed(f"hangs before step {step}")
            time.sleep(0.01)
        return False

    def ranks(self) -> list[int]:
        return children(self.process.pid)

    def send(self, number: int, *processes: int) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def wait(self) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed("hangs") from None
        finally:
            self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def records(run: Path) -> list[dict]:
    file = run / METRICS_FILE
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(rows: list[dict]) -> int:
    return max((row["step"] for row in rows if "loss" in row), default=0)


def children(process: int) -> list[int]:
    with suppress(OSError):
        return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def interrupt(kind: str, launch: Launch, settings: Settings, draw: random.Random) -> bool:
    """One interruption; whether the launcher has to be started again."""
    processes = launch.ranks()
    if kind == "rank":
        launch.send(signal.SIGKILL, *draw.sample(processes, min(1, len(processes))))
        return False
    if kind == "all":
        launch.send(signal.SIGKILL, *processes)
        return False
    if kind == "launcher":
        launch.send(signal.SIGKILL, launch.process.pid)
        launch.wait()
        deadline = time.monotonic() + PATIENCE
        while any(map(is_alive, processes)):
            if time.monotonic() > deadline:
                raise Failed("ranks outlive their launcher")
            time.sleep(0.01)
        return True
    if kind == "term":
        began = launch.began
        launch.send(signal.SIGTERM, launch.process.pid)
        code, taken = launch.wait(), last_step(records(launch.run)[began:])
        if code == 0:
            return False
        if code != EXIT_CODE and 0 < taken < settings.steps:
            raise Failed(f"exit code {code} after step {taken}")
        if taken > 0 and (saved := require_latest(launch.run).name) != f"step-{taken:08d}":
            raise Failed(f"{saved} was saved after step {taken}")
        return True
    raise SystemExit(f"trials: got {kind!r}, expected rank, all, launcher or term")


def trial(
    kinds: list[str], run: Path, ranks: int, settings: Settings, step_seconds: float, draw: random.Random
) -> None:
    """One run with these interruptions. Raises Failed if it does not end well."""
    launch, reached = Launch(run, ranks, settings), 0
    try:
        for kind in kinds:
            reached = draw.randint(reached, max(reached, settings.steps - 1))  # 0: in its start
            if reached > 0 and not launch.wait_for_step(reached):
                break  # the moment came too late: the run is at its end
            time.sleep(draw.uniform(0, 2 * step_seconds if reached > 0 else 40 * step_seconds))
            if interrupt(kind, launch, settings, draw):
                launch = Launch(run, ranks, settings)
        if (code := launch.wait()) != 0:
            raise Failed(f"exit code {code}")
    finally:
        launch.end()


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    path = require_latest(run)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in entries.items() if hasattr(m, "size")}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def require_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    if differing := [name for name in wanted if name not in got or not torch.equal(got[name], wanted[name])]:
        raise Failed(f"{len(differing)} tensors differ, the first {differing[0]}")


def write_data(folder: Path) -> None:
    draw = random.Random(0)
    for split in ("train", "valid"):
        with TokenFileWriter(folder / split, "uint16") as writer:
            for _ in range(40):
                writer.add_document([*draw.choices(range(256), k=draw.randint(1, 200)), 256])


def main(settings: Settings) -> None:
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    print(f"moments: --seed {seed}", flush=True)
    draw, failed = random.Random(seed), 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        for ranks in settings.ranks:
            straight = folder / f"straight-{ranks}"
            launch = Launch(straight, ranks, settings)
            launch.wait_for_step(1)
            began = time.monotonic()
            if launch.wait() != 0:
                raise SystemExit(straight.with_suffix(".log").read_text())
            step_seconds, wanted = (time.monotonic() - began) / settings.steps, saved_tensors(straight)
            for kinds in settings.trials:
                well = 0
                for number in range(settings.times):
                    run = folder / f"{kinds}-{ranks}-{number}"
                    try:
                        trial(kinds.split("+"), run, ranks, settings, step_seconds, draw)
                        require_same(saved_tensors(run), wanted)
                        well += 1
                    except (Failed, ValueError) as error:
                        print(f"{run.name}: {error}\n{run.with_suffix('.log').read_text()}", flush=True)
                resumed = sum(RESUMED in row for path in folder.glob(f"{kinds}-{ranks}-*/") for row in records(path))
                print(
                    f"{ranks} ranks, {kinds}: {well} of {settings.times} end with the bits of the uninterrupted run; "
                    f"they went on from a checkpoint {resumed} times",
                    flush=True,
                )
                failed += settings.times - well
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
