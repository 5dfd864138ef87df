"""What was found out about a run is kept in its directory: a run that is finished is not run again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lasp.config import TrainConfig, as_json, with_defaults
from lasp.training.together import on_rank_0


def remembered(config: TrainConfig, file: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find` gives, as JSON gives it back; or what it gave before, for the run of the same settings."""
    found = known(config, file)
    return keep(config, file, find()) if found is None else found


def known(config: TrainConfig, file: str) -> dict[str, Any] | None:
    """What was kept of the run of the same settings, if anything was; a setting that there was not yet had its
    default."""
    path = Path(config.run_dir) / file
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    return kept["cell"] if with_defaults(TrainConfig, kept["config"]) == as_json(config) else None


def keep(config: TrainConfig, file: str, found: dict[str, Any]) -> dict[str, Any]:
    """Keeps it, and returns it as JSON gives it back."""
    text = json.dumps({"config": as_json(config), "cell": found})
    on_rank_0(dist.group.WORLD, lambda: (Path(config.run_dir) / file).write_text(text))
    return json.loads(text)["cell"]
