"""Checkpoints: a directory per saved step, complete or absent, and a file `latest` that names the last one.

    run_dir/checkpoints/step-00001000/    torch.distributed.checkpoint files and config.json
    run_dir/checkpoints/latest            "step-00001000"

A step is written under a temporary name, flushed to disk and renamed; `latest` moves last. run_dir is one directory
that every rank sees. A checkpoint may be loaded by another number of ranks: only the random generators' states belong
to ranks, and those of ranks that were not there stay as they are.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lasp.config import ModelConfig, TrainConfig, require
from lasp.models import Decoder
from lasp.parallel.agreement import agree

CONFIG_FILE = "config.json"


def save(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    record: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Saves model, optimiser, generators and the number of steps taken; keeps the newest config.checkpoint_keep.

    record: what to write beside the configuration (see lasp.training.same_run).
    """
    state_dict = {**_training_state(model, optimizer), **_generators(), "step": step}
    commit(run_dir, step, config, lambda directory: dcp.save(state_dict, checkpoint_id=directory), record)


def commit(
    run_dir: str | Path,
    step: int,
    config: TrainConfig,
    write: Callable[[Path], object],
    record: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Makes what `write(directory)` saves the run's last checkpoint.

    `write` is called on every rank and returns on rank 0 when every rank has written its part.
    """
    root = _root(run_dir)
    unfinished, finished = root / f"unfinished-step-{step:08d}", root / f"step-{step:08d}"
    write(unfinished)
    if _rank() != 0:
        return
    _write(unfinished / CONFIG_FILE, json.dumps({**dataclasses.asdict(config), **record}, indent=2))
    shutil.rmtree(finished, ignore_errors=True)
    unfinished.rename(finished)
    _flush(root)
    _write(root / "latest.new", finished.name)
    (root / "latest.new").replace(root / "latest")
    _flush(root)
    for old in sorted(root.glob("step-*"))[: -config.checkpoint_keep]:
        shutil.rmtree(old)


def restore(run_dir: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> int:
    """Loads the latest checkpoint, if there is one, and returns the number of steps taken (0 if there is none).

    Raises ValueError on every rank if it is of another model or damaged, or if ranks do not see the same one.
    """
    path = find_resumable(run_dir, config, next(model.parameters()).device)
    if path is None:
        return 0
    training = _training_state(model, optimizer)
    saved = _metadata(path).state_dict_metadata
    generators = {name: state for name, state in _generators().items() if name in saved}
    state_dict = {**training, **generators, "step": 0}
    _load(state_dict, path)
    set_state_dict(model, optimizer, model_state_dict=training["model"], optim_state_dict=training["optimizer"])
    _set_generators(generators)
    return state_dict["step"]


def find_resumable(
    run_dir: str | Path,
    config: TrainConfig,
    device: torch.device,
    check: Callable[[Path], object] = lambda path: None,
) -> Path | None:
    """The directory of the checkpoint to go on from, if there is one; removes what an interrupted save left.

    Raises ValueError on every rank if it is of another model or engine, if `check` raises that, or if ranks do not see
    the same one.
    """
    path = latest(run_dir)

    def require_resumable() -> Path | None:
        if path is not None:
            require_same_model(path, config.model)
            engine = _engine(path)
            require(engine == config.engine, f"checkpoint {path}", f"one of engine {engine!r}", repr(config.engine))
            check(path)
        return path

    agree(dist.group.WORLD if dist.is_initialized() else None, device, require_resumable)
    if _rank() == 0:
        for leftover in _root(run_dir).glob("unfinished-*"):
            shutil.rmtree(leftover)
    return path


def save_weights(path: str | Path, model: Decoder) -> None:
    """Writes a directory that `load_model` reads and TrainConfig.initial_weights can name: weights alone."""
    with _alone():
        dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)
    _write(Path(path) / CONFIG_FILE, json.dumps({"model": dataclasses.asdict(model.config)}, indent=2))


def load_model(path: str | Path, model: nn.Module) -> None:
    """Loads the weights of a checkpoint directory into a model on one process. Raises ValueError if it is damaged."""
    if _engine(path) == "deepspeed":
        from lasp.training.deepspeed import load_weights

        model.load_state_dict(load_weights(Path(path)))
        return
    state_dict = {"model": model.state_dict()}
    _load(state_dict, Path(path), alone=True)
    model.load_state_dict(state_dict["model"])


def latest(run_dir: str | Path) -> Path | None:
    """The directory of a run's last complete checkpoint. Raises ValueError if `latest` names one that is not there."""
    pointer = _root(run_dir) / "latest"
    if not pointer.exists():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not path.is_dir():
        raise ValueError(f"{pointer}: got {path.name!r}, expected the name of a checkpoint beside it")
    return path


def require_latest(run_dir: str | Path) -> Path:
    """The directory of a run's last complete checkpoint. Raises ValueError if there is none."""
    path = latest(run_dir)
    if path is None:
        raise ValueError(f"run_dir: got {str(run_dir)!r}, expected a directory with a checkpoint in it")
    return path


def read_config(path: str | Path) -> dict[str, Any]:
    """The training configuration of a checkpoint directory, as nested dicts. Raises ValueError if it is damaged."""
    try:
        return json.loads((Path(path) / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: got {error}, expected a readable {CONFIG_FILE}") from error


def require_same_model(path: Path, expected: ModelConfig) -> None:
    """Raises ValueError unless the weights in a checkpoint directory are those of such a model."""
    saved, wanted = read_config(path).get("model", {}), dataclasses.asdict(expected)
    fields = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if fields:
        differences = ", ".join(f"model.{f} {saved.get(f)!r} (this run: {wanted.get(f)!r})" for f in fields)
        raise ValueError(f"checkpoint {path}: got another model, expected this run's: {differences}")


def _engine(path: str | Path) -> str:
    return read_config(path).get("engine", "native")


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _load(state_dict: dict[str, Any], path: Path, *, alone: bool = False) -> None:
    try:
        with _alone():
            dcp.load(state_dict, checkpoint_id=path, no_dist=alone)
    except (Exception, CheckpointException) as error:  # the latter is no Exception; the causes are of many kinds
        raise ValueError(f"checkpoint {path}: got {error}, expected a complete one of this model") from error


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for, where it is
        yield


def _metadata(path: Path) -> Any:
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except Exception as error:
        raise ValueError(f"checkpoint {path}: got {error!r}, expected readable metadata") from error


def _generators() -> dict[str, torch.Tensor]:
    """The states of this rank's random generators."""
    states = {f"cpu_generator_of_rank_{_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda_generator_of_rank_{_rank()}"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, torch.Tensor]) -> None:
    for name, state in states.items():
        (torch.cuda if name.startswith("cuda") else torch).set_rng_state(state)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _root(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    """Makes renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
