"""Times `lasp prepare` with a tokenizer of one's own: megabytes of JSON Lines a second, memory of all its processes.

    python benchmarks/preparing.py --megabytes 100 --cores 2

The texts are those of the Python packages installed here (source and documentation), a file each; a tokenizer is
trained as `lasp tokenizer` does on every n-th part of them, a tenth in all. A megabyte is 10^6 bytes of the JSON Lines.
Seconds are the command's, from start to end; CPU seconds those of all its processes, which other work on the machine
changes less. Memory is the sum of the processes' proportional shares, looked at ten times a second (Linux).
"""

import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from ranks import say

from lasp.data.bpe import train_on

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh")
COLUMNS = ("MB", "vocabulary", "cores", "s", "MB/s", "CPU s", "tokens", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class Settings:
    megabytes: float = 100.0  # of JSON Lines
    vocab_size: int = 32_768
    cores: int = 2


def texts() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            yield path.read_text(errors="replace")


def write_lines(path: Path, size: float) -> int:
    """Documents until they have `size` bytes; returns how many they have."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in texts():
            written += file.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                return written
    raise ValueError(
        f"megabytes: got {size / 1e6}, expected at most {written / 1e6}, the texts that are installed here"
    )


class Memory:
    """The most that a process and its children have taken together, in bytes, since it was made."""

    def __init__(self, process: subprocess.Popen):
        self.peak, self._process = 0, process
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._process.poll() is None:
            self.peak = max(self.peak, sum(map(_proportional_share, _family(self._process.pid))))
            time.sleep(0.1)


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has ended
            continue
        found += [each for child in children for each in _family(int(child))]
    return found


def _proportional_share(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def main(settings: Settings) -> None:
    cores = sorted(os.sched_getaffinity(0))[: settings.cores]
    with tempfile.TemporaryDirectory() as folder:
        lines, tokenizer, output = (Path(folder) / name for name in ("texts.jsonl", "tokenizer.json", "tokens"))
        size = write_lines(lines, settings.megabytes * 1e6)
        say(train_on([lines], tokenizer, settings.vocab_size, characters=size // 10))
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        prepare = [sys.executable, "-m", "lasp", "prepare", str(lines)]
        prepare += ["--output", str(output), "--tokenizer", str(tokenizer)]
        process = subprocess.Popen(
            prepare, stdout=subprocess.PIPE, text=True, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
        memory = Memory(process)
        told, _ = process.communicate()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            sys.exit(process.returncode)
        tokens = sum((Path(folder) / f"tokens_{split}.bin").stat().st_size // 2 for split in ("train", "valid"))
    say(told)
    row = {
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "megabytes": size / 1e6,
        "vocab_size": settings.vocab_size,
        "cores": settings.cores,
        "seconds": seconds,
        "megabytes_per_second": size / 1e6 / seconds,
        "cpu_seconds": (cpu := after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "tokens": tokens,
        "peak_bytes": memory.peak,
    }
    cells = [f"{size / 1e6:.0f}", f"{settings.vocab_size:,}", str(settings.cores), f"{seconds:.1f}"]
    cells += [f"{size / 1e6 / seconds:.1f}", f"{cpu:.1f}", f"{tokens:,}", f"{memory.peak / 2**20:.0f}"]
    for line in (COLUMNS, ("-",) * len(COLUMNS), cells):
        say("| " + " | ".join(line) + " |")
    say(json.dumps(row))


if __name__ == "__main__":
    main(tyro.cli(Settings))
