"""The part of the labels that are the model's likeliest next tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lasp.data import Context
from lasp.evaluation.subject import Subject
from lasp.training.train import all_ranks


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    labels: int
    accuracy: float
    loss: float  # nats per label


def accuracy(subject: Subject, contexts: Iterable[Context]) -> Accuracy:
    """Over all labels of the contexts, the same on every rank. Raises ValueError if there is none."""
    totals = torch.zeros(3, dtype=torch.float64, device=subject.world.device)
    for _, scores in subject.scores(contexts):
        totals += torch.stack([torch.ones_like(scores.losses), scores.right, scores.losses]).double().sum(1)
    labels, right, loss = all_ranks(totals).tolist()
    if labels == 0:
        raise ValueError("data: got no label in any context, expected one at least: evaluate more contexts")
    return Accuracy(labels=int(labels), accuracy=right / labels, loss=loss / labels)
