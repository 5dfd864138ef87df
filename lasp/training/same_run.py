"""A run is one run: on all of its ranks, and before and after it was stopped.

Settings are compared by their dotted names, as optimizer.lr. Files are compared by what they hold, not by their paths:
token files by `TokenFile.fingerprint`, which says what it covers, tokenizers by a hash.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lasp.config import as_json, require, with_defaults
from lasp.data.tokenizer import BYTE, tokenizer_file

RECORD = "trained"  # where a checkpoint's settings say what the weights have seen

# What may be another when a run goes on, with all fields below a name: it is not what determines the losses (but for
# rounding), or (steps) what a run is prolonged by. Restoring itself looks at the engine and at DeepSpeed's stage.
MAY_CHANGE = (
    "run_dir",
    "steps",
    "parallel",
    "engine",
    "deepspeed",
    "contexts_at_once",
    "initial_weights",
    "device",
    "recompute",
    "recompute_layers",
    "offload_activations",
    "segment_tokens",
    "segment_offload",
    "segment_graphs",
    "eval_every",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_keep_every",
    "checkpoint_async",
    "checkpoint_timeout",
    "skip_nonfinite",
    "compare_replicas_every",
    "allow_changed",
    "log_every",
    "profile",
    "wandb",
)
PART_OF_A_CHECKPOINT = ("model", "optimizer.betas", "optimizer.weight_decay")  # which no permission would change


def settings(config: Any, fingerprints: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """The fields of a configuration by dotted names, as JSON would give them back; fingerprints in the place of paths.

    Raises ValueError if config.allow_changed names what is no field.
    """
    names = _flat(as_json(config)) | dict(fingerprints)
    for name in config.allow_changed:
        known = any(_covers(name, field) for field in names)
        require(known, "allow_changed", name, "the name of a field, as seed or optimizer.lr")
    return names


def tokenizer_fingerprint(name_or_path: str) -> str:
    """A hash of a tokenizer's file; the byte tokenizer's name."""
    if name_or_path == BYTE:
        return BYTE
    return f"hash {hashlib.blake2b(tokenizer_file(name_or_path).read_bytes(), digest_size=16).hexdigest()}"


def require_same_on_ranks(settings_of_ranks: list[dict[str, Any]]) -> None:
    """Raises ValueError, naming fields, values and ranks, unless all ranks have the same settings."""
    told = []
    for name in settings_of_ranks[0]:
        ranks: dict[str, list[int]] = {}
        for rank, mine in enumerate(settings_of_ranks):
            ranks.setdefault(repr(mine.get(name)), []).append(rank)
        if len(ranks) > 1:
            told.append(f"{name}: got " + ", ".join(f"{value} on {_some(which)}" for value, which in ranks.items()))
    if told:
        raise ValueError(f"{'; '.join(told)}; expected the same on every rank")


def record(tokens: int, fingerprints: dict[str, str], positions: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What a checkpoint keeps beside its settings: how far in the stream of tokens the run is, and whose tokens.

    positions: how far it is in each corpus, by its fingerprint; in the one that there is, if None.
    """
    return {RECORD: {"tokens": tokens, "fingerprints": fingerprints} | ({"positions": positions} if positions else {})}


def positions_seen(saved: dict[str, Any]) -> dict[str, int]:
    """How far in each corpus, by its fingerprint, a checkpoint of this configuration and record is."""
    trained = saved[RECORD]
    return trained.get("positions", {trained["fingerprints"]["data.train"]: trained["tokens"]})


def tokens_seen(
    checkpoint: Path,
    saved: dict[str, Any],
    config: Any,
    fingerprints: Mapping[str, str],
    *,
    may_change: tuple[str, ...] = MAY_CHANGE,
    fixed: tuple[str, ...] = PART_OF_A_CHECKPOINT,
) -> int:
    """How far in the stream of tokens a checkpoint is whose configuration and record are `saved`, as nested dicts.

    Raises ValueError, naming each field with both values, if the configuration is that of another run: if it differs
    in a field that is neither in `may_change` nor in its own allow_changed, or that is in `fixed`. A field that there
    was not when it was saved had its default.
    """
    before = dict(saved)
    trained = before.pop(RECORD, None)
    require(trained is not None, f"checkpoint {checkpoint}", "no record of what it was trained on", "one")
    old = _flat(with_defaults(type(config), before)) | trained["fingerprints"]
    current = settings(config, fingerprints)
    free = (*may_change, *config.allow_changed)
    told = [
        f"{name}: got {current.get(name)!r}, expected {old.get(name)!r}"
        for name in {**old, **current}
        if old.get(name) != current.get(name)
        and (any(_covers(one, name) for one in fixed) or not any(_covers(one, name) for one in free))
    ]
    if told:
        raise ValueError(
            f"{'; '.join(told)}, as in checkpoint {checkpoint}, from which this run goes on. "
            f"Fields named in allow_changed may differ, except {', '.join(fixed)}; a new run_dir begins a new run"
        )
    return trained["tokens"]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in nested.items():
        names |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return names


def _covers(name: str, field: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _some(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:4]))}{more}"
