"""Synthetic tasks as data sets: sequences of words (ids) of equal length, and a mask of those that are to be predicted.

Every answer stands in the sequence behind its question, so that a label is the next token, as in any text: papers that
have models answer beside the sequence ask the same, but do not show the answer afterwards.
"""

from lasp.evaluation.tasks.compression import Compression
from lasp.evaluation.tasks.dataset import Task, write
from lasp.evaluation.tasks.fuzzy_recall import FuzzyRecall
from lasp.evaluation.tasks.in_context_recall import InContextRecall
from lasp.evaluation.tasks.mqar import MQAR
from lasp.evaluation.tasks.needles import NeedleTexts
from lasp.evaluation.tasks.selective_copying import SelectiveCopying

TASKS: dict[str, Task] = {
    "mqar": MQAR(),
    "in_context_recall": InContextRecall(),
    "noisy_recall": InContextRecall(noise=0.2),
    "fuzzy_recall": FuzzyRecall(),
    "compression": Compression(),
    "selective_copying": SelectiveCopying(),
    "needles": NeedleTexts(),
}

__all__ = [
    "MQAR",
    "TASKS",
    "Compression",
    "FuzzyRecall",
    "InContextRecall",
    "NeedleTexts",
    "SelectiveCopying",
    "Task",
    "write",
]
