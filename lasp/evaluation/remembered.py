"""What was found out about a run is kept in its directory: a run that is finished is not run again."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lasp.config import TrainConfig
from lasp.training.together import on_rank_0


def remembered(config: TrainConfig, file: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find` gives, as JSON gives it back; or what it gave before, for the run of the same settings."""
    path = Path(config.run_dir) / file
    settings = json.loads(json.dumps(asdict(config)))
    if path.is_file() and (known := json.loads(path.read_text()))["config"] == settings:
        return known["cell"]
    text = json.dumps({"config": settings, "cell": find()})
    on_rank_0(dist.group.WORLD, lambda: path.write_text(text))
    return json.loads(text)["cell"]
