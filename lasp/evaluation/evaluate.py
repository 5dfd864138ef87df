"""Runs an evaluation on the ranks that there are, and writes what it found."""

import torch.distributed as dist

from lasp.evaluation.config import Evaluation
from lasp.evaluation.labels import Labels
from lasp.evaluation.needle import Needle
from lasp.evaluation.position import LossByPosition
from lasp.evaluation.repeats import RecallInText
from lasp.evaluation.results import Result, require_writable, save
from lasp.evaluation.ruler import Ruler
from lasp.evaluation.subject import open_subject
from lasp.training.runtime import join_world
from lasp.training.together import on_rank_0

EVALUATIONS: dict[str, type[Evaluation]] = {
    "loss": LossByPosition,
    "recall": RecallInText,
    "labels": Labels,
    "needle": Needle,
    "ruler": Ruler,
}


def evaluate(evaluation: Evaluation) -> Result:
    """Evaluates; rank 0 writes NAME.json, NAME.txt and NAME.png to evaluation.folder and prints the table.

    Raises ValueError on every rank for a directory without a model, for a folder that cannot be written to (before
    anything is evaluated), for what the evaluation refuses, and what reading data and tokenizers raises.
    """
    (name,) = (name for name, kind in EVALUATIONS.items() if type(evaluation) is kind)
    with join_world(evaluation) as world:
        subject = open_subject(evaluation.model, world, evaluation.parallel, evaluation.dtype)
        on_rank_0(dist.group.WORLD, lambda: require_writable(evaluation.folder))  # before what may take hours
        result = evaluation.run(subject)
        on_rank_0(dist.group.WORLD, lambda: print(save(result, evaluation.folder, name), flush=True))
    return result
