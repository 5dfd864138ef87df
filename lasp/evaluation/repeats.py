"""Recall in real text: how well is a token predicted that has stood behind the same token before, by how far back that
was? Where accuracy falls with the distance, the model forgets."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lasp.data import Context
from lasp.evaluation.reading import Reading, by_group
from lasp.evaluation.results import aligned
from lasp.evaluation.score import Scores
from lasp.evaluation.subject import Subject
from lasp.pictures import empty_figure
from lasp.training.batches import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAREST = 16  # tokens; pairs that come again sooner are counted together


@dataclass(frozen=True, kw_only=True)
class RecallInText(Reading):
    """Accuracy and loss on tokens that complete a pair (the token before, the token) which has been in the document, by
    how far back it was last; after Zoology's "AR hits" (arXiv:2312.04927).

    Frequent pairs come again soon. So what was last seen far back are names and rare words, which only the context
    can tell.
    """

    def run(self, subject: Subject) -> "RecallResult":
        """Raises ValueError if there is nothing with a label, or if data or a length is missing."""
        edges = distance_edges(self.length(subject))
        borders = torch.tensor(edges, device=subject.world.device)
        contexts = list(self.read(subject))

        def scored() -> Iterator[tuple[Tensor, Scores]]:
            for context, (batch, scores) in zip(contexts, subject.scores(contexts), strict=True):
                back = local(torch.from_numpy(distances(context)), context, batch).to(borders.device)
                yield torch.bucketize(back[*scores.places.unbind(1)], borders, right=True) - 1, scores

        found = zip(edges, by_group(subject, len(edges), scored()), strict=True)
        return RecallResult([Distance(first=first, **of) for first, of in found if of])


def distance_edges(length: int) -> list[int]:
    """0 (never before), 1, and the doublings of NEAREST up to the length."""
    edges = [0, 1]
    while (edge := NEAREST * 2 ** (len(edges) - 2)) < length:
        edges.append(edge)
    return edges


def distances(context: Context) -> np.ndarray:
    """For each token of a context how far back the pair of it and its label was last, in its document; 0: nowhere."""
    tokens, labels = context.tokens(0, context.length).numpy(), context.labels(0, context.length).numpy()
    following = np.append(tokens[1:], labels[-1:])  # also where the label is masked
    document = np.repeat(np.arange(len(context.cu_seqlens) - 1), np.diff(context.cu_seqlens.numpy()))
    order = np.lexsort((following, tokens, document))
    same = np.ones(len(order) - 1, bool)
    for key in (document, tokens, following):
        same &= np.diff(key[order]) == 0
    found = np.zeros(len(order), np.int64)
    found[order[1:][same]] = np.diff(order)[same]
    return found


def local(x: Tensor, context: Context, batch: Batch) -> Tensor:
    """This rank's part [B, T_local] of what there is for each token of a context."""
    rows = x[None] if context.row_length is None else x.view(-1, context.row_length)
    return batch.seq.shard(rows.to(batch.seq.positions.device))


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Of tokens whose pair was last `first` or more tokens back, and less than the next larger `first`; 0: nowhere."""

    first: int
    labels: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class RecallResult:
    distances: list[Distance]

    def beyond(self, tokens: int) -> float | None:
        """The accuracy on all pairs that were last at least so many tokens back."""
        far = [one for one in self.distances if one.first >= max(1, tokens)]
        labels = sum(one.labels for one in far)
        return sum(one.labels * one.accuracy for one in far) / labels if labels else None

    def record(self) -> dict[str, Any]:
        return {"accuracy": self.beyond(1), "distances": [asdict(one) for one in self.distances]}

    def table(self) -> str:
        rows = [["last seen", "labels", "loss", "accuracy (%)"]]
        for one in self.distances:
            where = f"{one.first:,} or more tokens back" if one.first else "never"
            rows.append([where, f"{one.labels:,}", f"{one.loss:.4f}", f"{100 * one.accuracy:.1f}"])
        return aligned(rows)

    def figure(self) -> "Figure":
        figure = empty_figure(7, 4.5)
        axes = figure.add_subplot(xlabel="tokens since the pair was last seen", ylabel="accuracy (%)", xscale="log")
        seen = [one for one in self.distances if one.first]
        axes.plot([one.first for one in seen], [100 * one.accuracy for one in seen], marker=".")
        axes.set_ylim(0, 100)
        axes.grid(alpha=0.3)
        return figure
