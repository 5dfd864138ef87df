"""Trains for long and looks for what grows with the steps: memory, open files and threads of ranks and launcher, the
files of the run's directory, the time of a step.

    python benchmarks/soak.py --ranks 2 --starts 3 --steps 2000

A tiny hybrid over packed documents, whose borders are others in every step, saves every few steps, is told to stop
after so many steps, and goes on. Looked at are the last step, the seconds a step since the look before, and of the rank
that has most: resident memory, open files, threads. Growth is that from the median of the second quarter of a start's
looks to that of the last, for a thousand steps; what grew by more than the limits ends it with the exit code 1.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import tyro
from launches import Launch, write_data

from lasp.training.checkpoint import files
from lasp.training.metrics import METRICS_FILE
from lasp.training.stop import EXIT_CODE

MIB = 2**20
TAIL = 8192  # bytes of the metrics that hold a step's record


@dataclass(frozen=True, kw_only=True)
class Settings:
    ranks: int = 2
    starts: int = 3
    steps: int = 2000  # of each start
    every: float = 5.0  # seconds between looks
    most_memory: float = 4.0  # MiB a thousand steps
    options: str = "--context-length 512 --batch-contexts 2 --data.eval-contexts 2 --checkpoint-every 5 --eval-every 50"
    folder: Path | None = None  # where data and run are to stay


@dataclass(frozen=True)
class Look:
    """bytes, handles, threads: of the process that has most of them."""

    step: int
    time: float
    bytes: int
    handles: int
    threads: int

    @classmethod
    def at(cls, run: Path, processes: list[int]) -> "Look":
        return cls(_step(run), time.monotonic(), *map(max, zip(*map(_of_process, processes), strict=True)))


def _step(run: Path) -> int:
    with open(run / METRICS_FILE, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        whole = file.read().splitlines(keepends=True)[1:]
    rows = [json.loads(line) for line in whole if line.endswith(b"\n")]
    return max((row["step"] for row in rows if "loss" in row), default=0)


def _of_process(process: int) -> tuple[int, int, int]:
    place = Path(f"/proc/{process}")
    pages = int((place / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), *(len(os.listdir(place / name)) for name in ("fd", "task"))


def one_start(run: Path, settings: Settings) -> tuple[list[Look], list[Look]]:
    """Looks at the ranks and at their launcher, until the run has stopped."""
    launch = Launch(run, settings.ranks, f"--steps {10**9} {settings.options}")
    try:
        launch.wait_for_step(1)
        ranks, launcher = [], []
        first = _step(run)
        while launch.process.poll() is None and _step(run) - first < settings.steps:
            ranks.append(Look.at(run, launch.ranks()))
            launcher.append(Look.at(run, [launch.process.pid]))
            _tell(ranks)
            time.sleep(settings.every)
        launch.send(signal.SIGTERM, launch.process.pid)
        if (code := launch.wait()) != EXIT_CODE:
            sys.exit(f"exit code {code}:\n{run.with_suffix('.log').read_text()[-4000:]}")
    finally:
        launch.end()
    return ranks, launcher


def _tell(looks: list[Look]) -> None:
    now = looks[-1]
    of_process = f"{now.bytes / MIB:.1f} MiB, {now.handles} open files, {now.threads} threads"
    print(f"step {now.step}: {pace(looks[-2:]):.0f} ms, {of_process}", flush=True)


def growth(looks: list[Look], what: str) -> float:
    """For a thousand steps."""
    quarter = max(1, len(looks) // 4)
    early, late = looks[quarter : 2 * quarter] or looks[:1], looks[-quarter:]
    steps = median(look.step for look in late) - median(look.step for look in early)
    grown = median(getattr(look, what) for look in late) - median(getattr(look, what) for look in early)
    return 1000 * grown / max(1, steps)


def pace(looks: list[Look]) -> float:
    """Milliseconds a step."""
    return 1000 * (looks[-1].time - looks[0].time) / max(1, looks[-1].step - looks[0].step)


def inventory(run: Path) -> dict[str, int]:
    """How many files there are in every part of a run's directory, and the bytes of those beside them."""
    of_part = {p.name: sum(each.is_file() for each in p.rglob("*")) for p in run.iterdir() if p.is_dir()}
    return of_part | {p.name: p.stat().st_size for p in run.iterdir() if p.is_file()}


def main(settings: Settings) -> None:
    with TemporaryDirectory() as name:
        folder = settings.folder or Path(name)
        folder.mkdir(exist_ok=True)
        write_data(folder, documents=20_000, longest=40)
        run, well = folder / "run", True
        for number in range(settings.starts):
            ranks, launcher = one_start(run, settings)
            memory = {who: growth(looks, "bytes") / MIB for who, looks in (("ranks", ranks), ("launcher", launcher))}
            others = {what: growth(ranks, what) + growth(launcher, what) for what in ("handles", "threads")}
            paces = [pace(part) for part in (ranks[: len(ranks) // 2 + 1], ranks[len(ranks) // 2 :])]
            print(
                f"start {number + 1}, {ranks[-1].step - ranks[0].step} steps: memory of a rank {memory['ranks']:+.2f} "
                f"and of the launcher {memory['launcher']:+.2f} MiB, open files {others['handles']:+.2f}, threads "
                f"{others['threads']:+.2f} in a thousand steps; {paces[0]:.0f} ms a step, then {paces[1]:.0f}; "
                f"{len(files.saved(run / 'checkpoints'))} checkpoints; files or bytes: {inventory(run)}",
                flush=True,
            )
            well = well and max(memory.values()) <= settings.most_memory and max(others.values()) <= 0
    sys.exit(not well)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
