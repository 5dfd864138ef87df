"""Checkpoints: a directory per saved step, complete or absent, and a file `latest` that names the last one.

    run_dir/checkpoints/step-00001000/    torch.distributed.checkpoint files, config.json, SHA256SUMS
    run_dir/checkpoints/latest            "step-00001000"

A step is written under a temporary name, checked, flushed to disk and renamed; `latest` moves last. run_dir is one
directory that every rank sees. A checkpoint may be loaded by another number of ranks: only the random generators'
states belong to ranks, and those of ranks that were not there stay as they are.

What lasp deletes has exactly a name that lasp gives, and is older than the checkpoint just saved. So copies under names
of one's own stay, and so do later steps where `latest` was set back, until the run replaces them when it gets there.
"""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lasp.config import ModelConfig, TrainConfig, as_json, require, require_empty, with_defaults
from lasp.kernels.pending import Pending
from lasp.models import Decoder, make_model
from lasp.parallel import comm
from lasp.parallel.agreement import agree
from lasp.parallel.comm import Group
from lasp.training import files, storage
from lasp.training.integrity import CHECKSUMS_FILE, checksums, format_checksums, read_verified, require_finite, verify
from lasp.training.ownership import Lock
from lasp.training.together import beside, on_rank_0, together
from lasp.training.zero_files import load_weights

CONFIG_FILE = "config.json"


def save(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    lock: Lock | None = None,
    record: Mapping[str, object] = MappingProxyType({}),
    group: Group = None,
) -> Pending[None] | None:
    """Saves model, optimiser, generators and the number of steps taken; keeps the newest config.checkpoint_keep.

    record: what to write beside the configuration (see lasp.training.same_run). group: as in `commit`. Raises
    FloatingPointError on every rank, and saves nothing, if a weight or a state of the optimiser is not finite.
    """
    training = _training_state(model, optimizer)
    require_finite(_tensors(training), group or _world())
    state = {**training, **_generators(), "step": step}

    def write(directory: Path) -> Iterable[Path]:
        if config.checkpoint_async:
            written = storage.start_saving(state, directory, group)
        else:
            written = Pending(lambda: storage.save(state, directory, group=group))

        def own() -> Iterator[Path]:
            written.wait()
            yield from directory.glob(f"__{_rank()}_*")

        return own()

    return commit(run_dir, step, config, write, lock, record, group)


def commit(
    run_dir: str | Path,
    step: int,
    config: TrainConfig,
    write: Callable[[Path], Iterable[Path]],
    lock: Lock | None = None,
    record: Mapping[str, object] = MappingProxyType({}),
    group: Group = None,
) -> Pending[None] | None:
    """Makes what `write(directory)` saves the run's last checkpoint.

    `write` is called on every rank. What it returns gives, when every rank has written its part, the files that are
    this rank's. Raises on every rank what one raises: ValueError if the lock is given and no longer held, or if rank 0
    does not see a file of another rank.

    group: of all ranks, on CPUs, for the messages; the default group if None. With config.checkpoint_async a thread
    does what comes after `write`, and needs a group of its own; what it raises, the `wait()` of the result does.
    """
    root, group = _root(run_dir), group or _world()
    unfinished, finished = root / f"unfinished-step-{step:08d}", root / f"step-{step:08d}"
    own: list[Path] = []
    parts: list[dict[str, str]] = []

    def begin() -> None:
        if lock is not None:
            lock.require_held()
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish_own() -> dict[str, str]:
        for path in own:
            files.flush(path)
        return checksums(own)

    def finish() -> None:
        _write(unfinished / CONFIG_FILE, json.dumps({**dataclasses.asdict(config), **record}, indent=2))
        _seal(unfinished, parts)
        if lock is not None:
            lock.require_held()
        if finished.exists():
            _say(f"{finished} was there: replaced by step {step} of this run")
            files.discard(finished)
        # Before the rename, so that a crash leaves no doubt: latest.new counts once the directory has its name.
        _write(root / "latest.new", finished.name)
        files.flush(root)
        unfinished.rename(finished)
        files.flush(root)
        files.move_latest(root)
        every = config.checkpoint_keep_every
        older = [p for saved, p in files.saved(root).items() if saved < step and not (every and saved % every == 0)]
        for path in older[: max(0, len(older) + 1 - config.checkpoint_keep)]:
            files.discard(path)

    def complete() -> None:
        own.extend(written)
        parts.extend(together(group, finish_own))
        on_rank_0(group, finish)

    on_rank_0(group, begin)
    written = write(unfinished)
    if config.checkpoint_async:
        return beside(complete)
    complete()
    return None


def restore(
    run_dir: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, group: Group = None
) -> int:
    """Loads the latest intact checkpoint, if there is any; returns the number of steps taken (0 if there is none).

    Raises ValueError on every rank if it is of another model, if all are damaged, or if ranks do not see the same ones.
    """
    path = find_resumable(run_dir, config, group=group)
    if path is None:
        return 0
    training = _training_state(model, optimizer)
    saved = storage.read_metadata(path).state_dict_metadata
    generators = {name: state for name, state in _generators().items() if name in saved}
    state_dict = {**training, **generators, "step": 0}
    storage.load(state_dict, path, group=group)
    set_state_dict(model, optimizer, model_state_dict=training["model"], optim_state_dict=training["optimizer"])
    _set_generators(generators)
    return state_dict["step"]


def find_resumable(
    run_dir: str | Path,
    config: TrainConfig,
    check: Callable[[Path], object] = lambda path: None,
    group: Group = None,
) -> Path | None:
    """The directory of the checkpoint to go on from, if there is one; removes what an interrupted save left.

    That is the one that `latest` names; if it is damaged, the newest intact one before it, which `latest` names from
    then on. Raises ValueError on every rank if there is none, if it is of another model or engine, if `check` raises
    that, or if ranks do not see the same ones.
    """
    root, group = _root(run_dir), group or _world()
    candidates: list[Path] = []

    def list_candidates() -> list[Path]:
        path = latest(run_dir)
        if path is not None:
            step = files.step_of(path)
            older = [p for saved, p in files.saved(root).items() if step is not None and saved < step]
            candidates.extend([path, *reversed(older)])
        return candidates

    agree(group, list_candidates)
    path = _newest_intact(candidates, group)

    def require_resumable() -> None:
        if path is not None:
            require_same_model(path, config.model)
            engine = _engine(path)
            require(engine == config.engine, f"checkpoint {path}", f"one of engine {engine!r}", repr(config.engine))
            check(path)

    agree(group, require_resumable)
    on_rank_0(group, lambda: _tidy(root, path))
    return path


def save_weights(path: str | Path, model: Decoder) -> None:
    """Writes a new directory that `load_model` reads and TrainConfig.initial_weights can name: weights alone."""
    directory = require_empty(path)
    weights = {"model": model.state_dict()}
    require_finite(_tensors(weights), None)
    storage.save(weights, directory, alone=True)
    _write(directory / CONFIG_FILE, json.dumps({"model": dataclasses.asdict(model.config)}, indent=2))
    _seal(directory, [])


def load_model(path: str | Path, model: nn.Module, *, on_all_ranks: bool = False) -> None:
    """Loads the weights of a checkpoint directory into a model, whole on this process.

    Raises ValueError if it is damaged. If all ranks load it at once, they share the work of looking.
    """
    verify(Path(path), _world() if on_all_ranks else None)
    if _engine(path) == "deepspeed":
        model.load_state_dict(load_weights(Path(path), read_config(Path(path))["deepspeed"]["stage"]))
        return
    state_dict = {"model": model.state_dict()}
    storage.load(state_dict, path, alone=True)
    model.load_state_dict(state_dict["model"])


def read_model(
    path: str | Path, config: Mapping[str, Any], make: Callable[[ModelConfig], Decoder] = make_model
) -> Decoder:
    """The model in a checkpoint of a run with this configuration (see `read_config`), in float64 if it was trained so,
    else in float32. Raises ValueError as `load_model`."""
    model = make(ModelConfig(**config["model"]))
    if config["dtype"] == "float64":
        model.double()
    load_model(path, model)
    return model


def latest(run_dir: str | Path) -> Path | None:
    """The directory of a run's last complete checkpoint, None if nothing was saved.

    Raises ValueError if `latest` names one that is not there, or is lost itself.
    """
    root = _root(run_dir)
    for pointer in (root / "latest.new", root / "latest"):
        if pointer.exists():
            name = pointer.read_text(errors="replace").strip()
            if name and (root / name).is_dir():
                return root / name
            if pointer.name == "latest":
                raise ValueError(f"{pointer}: got {name!r}, expected the name of a checkpoint beside it")
    if saved := [path.name for path in files.saved(root).values()]:
        pointer = root / "latest"
        raise ValueError(
            f"{pointer}: got no such file beside {', '.join(saved)}, expected one with the name to go on from; "
            f"run: echo {saved[-1]} > {shlex.quote(str(pointer))} (or move them away to begin anew)"
        )
    return None


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is the directory of a checkpoint, or of weights alone, and not of a run."""
    return (Path(path) / CHECKSUMS_FILE).is_file()


def require_latest(run_dir: str | Path) -> Path:
    """The directory of a run's last complete checkpoint, or that of a checkpoint itself. Raises ValueError if there is
    none."""
    if is_checkpoint(run_dir):
        whole = "data" in read_config(run_dir)
        require(whole, "run_dir", str(run_dir), "a run's directory or a checkpoint of one; these are weights alone")
        return Path(run_dir)
    path = latest(run_dir)
    if path is None:
        raise ValueError(f"run_dir: got {str(run_dir)!r}, expected a directory with a checkpoint in it")
    return path


def read_config(path: str | Path, *, verified: bool = True) -> dict[str, Any]:
    """The training configuration of a checkpoint directory, as nested dicts. Raises ValueError if it is damaged.

    verified: by its checksum, which checkpoints of earlier versions have not.
    """
    if verified:
        return json.loads(read_verified(Path(path), CONFIG_FILE))
    try:
        return json.loads((Path(path) / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path}: got {error}, expected a readable {CONFIG_FILE}") from error


def require_same_model(path: Path, expected: ModelConfig) -> None:
    """Raises ValueError unless the weights in a checkpoint directory are those of such a model."""
    saved, wanted = with_defaults(ModelConfig, read_config(path).get("model", {})), as_json(expected)
    fields = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if fields:
        differences = ", ".join(f"model.{f} {saved.get(f)!r} (this run: {wanted.get(f)!r})" for f in fields)
        raise ValueError(f"checkpoint {path}: got another model, expected this run's: {differences}")


def _engine(path: str | Path) -> str:
    return read_config(path).get("engine", "native")


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _newest_intact(candidates: list[Path], group: Group) -> Path | None:
    """The first of them that is intact. Raises ValueError, on every rank, if there are some and none is."""
    damage: list[str] = []
    for path in candidates:
        try:
            verify(path, group)
        except ValueError as error:
            damage.append(str(error))
            continue
        if damage:
            _say(f"{'; '.join(damage)}. Going on from {path}")
        return path
    if damage:
        raise ValueError("; ".join(damage))
    return None


def _tidy(root: Path, path: Path | None) -> None:
    """Removes what an interrupted save has left, makes `latest` name `path`, and tells of later steps."""
    if path is not None:
        pointer = root / "latest"
        if not pointer.exists() or pointer.read_text(errors="replace").strip() != path.name:
            _write(root / "latest.new", path.name)
            files.move_latest(root)
        step = files.step_of(path)
        later = [p.name for saved, p in files.saved(root).items() if step is not None and saved > step]
        if later:
            _say(f"{root}: going on from {path.name}; {', '.join(later)} will be replaced when the run gets there")
    files.remove_leftovers(root)


def _seal(directory: Path, parts: list[dict[str, str]]) -> None:
    """Writes a directory's checksums: those that ranks have computed of the files they wrote, and of all others."""
    there = {path.name for path in directory.iterdir()}
    for rank, part in enumerate(parts):
        missing = sorted(part.keys() - there)
        require(not missing, f"checkpoint {directory}", f"no {missing[:1]} of rank {rank}", "what every rank wrote")
    known = {name: checksum for part in parts for name, checksum in part.items()}
    others = checksums(directory / name for name in there - known.keys())
    _write(directory / CHECKSUMS_FILE, format_checksums(known | others))
    files.flush(directory)


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state dict, by their names."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else key)


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
    return comm.rank(_world())


def _world() -> Group:
    return dist.group.WORLD if dist.is_initialized() else None


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def _root(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def _write(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
