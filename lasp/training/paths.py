"""A run can be used from any folder: its paths are absolute, and its tokenizer lies in its own directory."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lasp.config import TrainConfig, require
from lasp.data.tokenizer import BYTE, load_tokenizer

TOKENIZER_FILE = "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # in a Hugging Face directory


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same run, whatever the working directory will be."""
    data, initial = config.data, config.initial_weights
    train, valid = (
        os.path.abspath(named) if isinstance(named, str) else tuple(map(os.path.abspath, named))
        for named in (data.train, data.valid)
    )
    tokenizer = BYTE if data.tokenizer == BYTE else os.path.abspath(data.tokenizer)
    return replace(
        config,
        run_dir=os.path.abspath(config.run_dir),
        data=replace(data, tokenizer=tokenizer, train=train, valid=valid),
        initial_weights=None if initial is None else os.path.abspath(initial),
    )


def with_vocabulary(config: TrainConfig) -> TrainConfig:
    """The same run, its model with as many ids as its tokenizer has if the number was left open.

    Raises FileNotFoundError if the tokenizer is not there, ValueError if it has more ids than the model.
    """
    needed, model = load_tokenizer(config.data.tokenizer).vocab_size, config.model
    size = model.vocab_size or needed
    require(size >= needed, "vocab_size", size, f"at least the tokenizer's {needed}; 0 for just so many")
    return replace(config, model=replace(model, vocab_size=size))


def keep_tokenizer(config: TrainConfig) -> None:
    """Copies the tokenizer to the run's directory, in place of that of an earlier start, with what describes it."""
    source, kept = Path(config.data.tokenizer), _kept(config.run_dir)
    file = source / TOKENIZER_FILE if source.is_dir() else source
    if config.data.tokenizer == BYTE or (kept.exists() and kept.samefile(file)):
        return
    shutil.rmtree(kept.parent, ignore_errors=True)
    kept.parent.mkdir(parents=True)
    if file.name == TOKENIZER_FILE:
        for other in (file.with_name(name) for name in BESIDE):
            if other.is_file():
                shutil.copyfile(other, kept.with_name(other.name))
    unfinished = kept.with_suffix(".tmp")
    shutil.copyfile(file, unfinished)
    unfinished.rename(kept)


def tokenizer_of(run_dir: str, config: dict[str, Any]) -> str:
    """What to give `load_tokenizer` for a run of this configuration: the run's own copy, if there is one.

    run_dir: the run's directory, or a checkpoint in it.
    """
    folder = Path(run_dir).resolve()
    in_a_run = folder.parent.name == "checkpoints"
    name, kept = config["data"]["tokenizer"], _kept(folder.parents[1] if in_a_run else run_dir)
    return str(kept) if name != BYTE and kept.is_file() else name


def _kept(run_dir: str | Path) -> Path:
    return Path(run_dir) / "tokenizer" / TOKENIZER_FILE
