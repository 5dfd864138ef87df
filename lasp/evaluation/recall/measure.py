"""What a trained run of a sweep has found: accuracies, and how much its model keeps of a sequence."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from lasp.config import ModelConfig
from lasp.data import TokenFile
from lasp.evaluation.labels import Accuracy, file_accuracy
from lasp.evaluation.recall.job import Job
from lasp.evaluation.recall.report import Cell
from lasp.evaluation.subject import Subject
from lasp.models import Decoder, Memory, count_parameters
from lasp.parallel import SequenceParallel
from lasp.training.metrics import METRICS_FILE

BATCH_TOKENS = 65_536  # are evaluated together


def measure(job: Job, subject: Subject, meanwhile: Callable[[], object] = lambda: None) -> Cell:
    """A trained cell's accuracies and loss on what was held out. meanwhile: is called between the files."""
    found: dict[str, Accuracy] = {}
    for pairs in job.sweep.task.pairs:
        meanwhile()
        found[str(pairs)] = file_accuracy(subject, TokenFile(job.sweep.held_out_data(pairs)), BATCH_TOKENS)
    loss = sum(each.loss * each.labels for each in found.values()) / sum(each.labels for each in found.values())
    return _cell(job, loss, {pairs: each.accuracy for pairs, each in found.items()})


def diverged(job: Job) -> Cell:
    """That of a run whose loss was not finite: other cells are to be found all the same."""
    return _cell(job, None, {str(pairs): 0.0 for pairs in job.sweep.task.pairs})


def _cell(job: Job, loss: float | None, accuracy: dict[str, float]) -> Cell:
    model = job.config.model
    return Cell(
        model=job.model,
        width=job.width,
        lr=job.lr,
        seed=job.seed,
        parameters=count_parameters(model),
        state=kept_numbers(model, job.sweep.task.length),
        loss=loss,
        accuracy=accuracy,
    )


def keep_losses(run_dir: str, losses: list[float]) -> None:
    """Among the run's metrics, the means of a hundred stretches."""
    stretch = -(-len(losses) // 100)
    ends = [min(first + stretch, len(losses)) for first in range(0, len(losses), stretch)]
    points = [{"step": end, "loss": mean(losses[end - stretch : end])} for end in ends]
    (Path(run_dir) / METRICS_FILE).write_text("".join(f"{json.dumps(point)}\n" for point in points))


@cache
def kept_numbers(config: ModelConfig, tokens: int) -> int:
    """`state_size` of such a model."""
    with torch.device("cpu"):
        return state_size(Decoder(config), tokens)


@torch.inference_mode()
def state_size(model: Decoder, tokens: int) -> int:
    """The numbers that a model keeps of so many tokens, in order to go on: states, tails, keys and values."""
    memory, device = Memory(), model.embedding.weight.device
    seq = SequenceParallel(None, device=device).sequence(tokens)
    model(torch.zeros(1, tokens, dtype=torch.int64, device=device), seq, memory=memory)
    return sum(_numbers(slot) for slots in memory.slots.values() for slot in slots)


def _numbers(slot: Any) -> int:
    return slot.numel() if isinstance(slot, torch.Tensor) else sum(map(_numbers, slot))
