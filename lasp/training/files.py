"""The files of a run's checkpoints: the names that lasp gives them, and changes that a crash leaves whole."""

import os
import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"(unfinished|removed)-step-\d{8,}")


def saved(root: Path) -> dict[int, Path]:
    """The checkpoints that have names as lasp gives them, by their step, in order; not what links lead to."""
    steps = {step_of(path): path for path in root.glob("step-*") if path.is_dir() and not path.is_symlink()}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}


def step_of(path: Path) -> int | None:
    """The step of a checkpoint by its name; None for a name that lasp does not give."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match and path.name == f"step-{int(match[1]):08d}" else None


def discard(path: Path) -> None:
    """Removes a checkpoint, which at no moment has its name and is not whole."""
    removed = path.with_name(f"removed-{path.name}")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def move_latest(root: Path) -> None:
    """Puts what is in `latest.new` in place of `latest`."""
    (root / "latest.new").replace(root / "latest")
    flush(root)


def remove_leftovers(root: Path) -> None:
    """Removes what saves and removals that were interrupted have left."""
    (root / "latest.new").unlink(missing_ok=True)
    for path in root.glob("*-step-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def flush(path: Path) -> None:
    """Makes a file, or the renames within a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
