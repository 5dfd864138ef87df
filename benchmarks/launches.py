"""Runs of a tiny hybrid by lasp's launcher, on CPUs, for what watches or interrupts them (Linux)."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from lasp.data import TokenFileWriter
from lasp.training.metrics import METRICS_FILE

ROOT = Path(__file__).parents[1]
PATIENCE = 600.0  # seconds
MODEL = (
    "--model.num-layers 2 --model.pattern LN --model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16"
)
LOOP = "--device cpu --checkpoint-keep 2 --optimizer.warmup-steps 1"


class Failed(Exception):
    pass


class Launch:
    """A launcher and its ranks, in a run's directory."""

    def __init__(self, run: Path, ranks: int, options: str) -> None:
        self.run, self.began = run, len(records(run))
        data = f"--data.train {run.parent}/train --data.valid {run.parent}/valid --run-dir {run}"
        command = [sys.executable, str(ROOT / "launch/elastic.py"), str(ranks), "-m", "lasp.cli", "train", "quickstart"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.log = open(run.with_suffix(".log"), "a")  # noqa: SIM115 (closed by wait)
        self.process = subprocess.Popen(
            [*command, *f"{MODEL} {LOOP} {data} {options}".split()],
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


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, processes)):
        if time.monotonic() > deadline:
            raise Failed("ranks outlive what was to end them")
        time.sleep(0.01)


def write_data(folder: Path, documents: int = 40, longest: int = 200) -> None:
    draw = random.Random(0)
    for split in ("train", "valid"):
        with TokenFileWriter(folder / split, "uint16") as writer:
            for _ in range(documents):
                writer.add_document([*draw.choices(range(256), k=draw.randint(1, longest)), 256])
