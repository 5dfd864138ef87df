"""How a run was started, each time: enough to go on with it, and to know later what has made it.

    run_dir/starts.jsonl    a line for each start: time, command, folder, host, ranks, versions, and the configuration

`lasp resume` goes on with the last of them.
"""

import json
import os
import platform
import socket
import sys
from dataclasses import asdict, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lasp.config import TrainConfig, require
from lasp.training import checkpoint
from lasp.training.paths import tokenizer_of

STARTS_FILE, BEGUN_FILE = "starts.jsonl", "begun.json"
PACKAGES = ("lasp-sp", "torch", "triton", "numpy", "tokenizers", "deepspeed")


def keep_start(config: TrainConfig, ranks: int) -> None:
    """Adds this start to the run's."""
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": socket.gethostname(),
        "ranks": ranks,
        "versions": _versions(),
        "config": asdict(config),
    }
    path = Path(config.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    with open(path / STARTS_FILE, "a") as file:
        file.write(json.dumps(start) + "\n")


def last_config(run_dir: str) -> TrainConfig:
    """The configuration of a run's last start, for where the run's directory is now, with the run's own tokenizer.

    Raises ValueError if the directory has none, or an unreadable one.
    """
    file = Path(run_dir) / STARTS_FILE
    require(file.is_file(), "run_dir", run_dir, f"the directory of a run, with {STARTS_FILE} in it")
    lines = file.read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut short by a crash
    try:
        saved = json.loads(whole[-1])["config"]
        config = TrainConfig.from_dict(saved)
    except (IndexError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: got {error!r} in its last line, expected a start with its config") from error
    data = replace(config.data, tokenizer=tokenizer_of(run_dir, saved))
    initial = config.initial_weights if checkpoint.latest(run_dir) is None else None
    return replace(config, run_dir=run_dir, data=data, initial_weights=initial)


def begin(folder: str, **told: str) -> None:
    """Notes in a folder for several runs what they begin with, by absolute paths.

    Raises ValueError if the folder holds a run of its own, or if it was begun with something else.
    """
    told = {name: os.path.abspath(path) for name, path in told.items()}
    file = Path(folder) / BEGUN_FILE
    if file.is_file():
        known = json.loads(file.read_text())
        require(known == told, "output", f"{folder} for {told}", f"a new directory; this one has begun with {known}")
        return
    require(checkpoint.latest(folder) is None, "output", folder, "a new directory; this one holds a run")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
