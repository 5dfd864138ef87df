"""Accuracy on the labels of token files, such as recall tasks: the part that are the model's likeliest next tokens."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lasp.config import require
from lasp.data import Context, TokenFile
from lasp.evaluation.config import Evaluation
from lasp.evaluation.contexts import whole_documents
from lasp.evaluation.results import aligned
from lasp.evaluation.subject import Subject
from lasp.fields import Count, FilePath
from lasp.pictures import empty_figure
from lasp.training.train import all_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Labels(Evaluation):
    """Accuracy and loss on the labels of token files, as `lasp synthesize` and `lasp prepare --chat` write them."""

    data: tuple[FilePath, ...]  # prefixes of token files
    batch_tokens: Count = 65_536  # so many are read together, in whole documents

    def run(self, subject: Subject) -> "LabelsResult":
        require(len(self.data) > 0, "data", self.data, "at least one prefix of token files")
        files = {prefix: TokenFile(prefix) for prefix in self.data}
        return LabelsResult({prefix: file_accuracy(subject, file, self.batch_tokens) for prefix, file in files.items()})


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    labels: int
    accuracy: float
    loss: float  # nats per label


def file_accuracy(subject: Subject, file: TokenFile, batch_tokens: int) -> Accuracy:
    """On all documents of a file. Raises ValueError for a token that is not in the vocabulary."""
    return accuracy(subject, whole_documents(file, batch_tokens, subject.model.config.vocab_size))


def accuracy(subject: Subject, contexts: Iterable[Context]) -> Accuracy:
    """Over all labels of the contexts, the same on every rank. Raises ValueError if there is none."""
    totals = torch.zeros(3, dtype=torch.float64, device=subject.world.device)
    for _, scores in subject.scores(contexts):
        totals += torch.stack([torch.ones_like(scores.losses), scores.right, scores.losses]).double().sum(1)
    labels, right, loss = all_ranks(totals).tolist()
    require(labels > 0, "data", "no label in any document", "one at least")
    return Accuracy(labels=int(labels), accuracy=right / labels, loss=loss / labels)


@dataclass(frozen=True)
class LabelsResult:
    files: dict[str, Accuracy]

    def record(self) -> dict[str, Any]:
        return {prefix: asdict(found) for prefix, found in self.files.items()}

    def table(self) -> str:
        rows = [
            [prefix, f"{found.labels:,}", f"{100 * found.accuracy:.2f}", f"{found.loss:.4f}"]
            for prefix, found in self.files.items()
        ]
        return aligned([["data", "labels", "accuracy (%)", "loss"], *rows])

    def figure(self) -> "Figure | None":
        if len(self.files) == 1:
            return None
        figure = empty_figure(7, 1.5 + 0.3 * len(self.files))
        axes = figure.add_subplot(xlabel="accuracy (%)", xlim=(0, 100))
        axes.barh(list(self.files), [100 * found.accuracy for found in self.files.values()])
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        return figure
