"""What evaluations that read texts are told, which and how much of them, and what they find by groups of labels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lasp.config import require
from lasp.data import Context, PackedContexts
from lasp.evaluation.config import Evaluation
from lasp.evaluation.contexts import text_contexts
from lasp.evaluation.score import Scores
from lasp.evaluation.subject import Subject
from lasp.fields import Count, FilePath
from lasp.training.train import all_ranks


@dataclass(frozen=True, kw_only=True)
class Reading(Evaluation):
    """On token files or texts."""

    data: FilePath | None = None  # prefix of token files; the run's held-out ones if None and there are no texts
    texts: tuple[FilePath, ...] = ()  # files of text, each a document, in place of token files
    context_length: Count | None = None  # tokens; the run's if None
    contexts: Count = 64  # at most so many, the first ones

    def length(self, subject: Subject) -> int:
        """Of a context. Raises ValueError if nobody knows."""
        length = self.context_length or subject.origin.context_length
        if length is None:
            raise ValueError("context_length: got None, expected a number of tokens for a model without its run")
        return length

    def read(self, subject: Subject) -> Iterator[Context]:
        """The contexts. Raises ValueError if data or a length is missing."""
        return islice(self._all(subject), self.contexts)

    def _all(self, subject: Subject) -> Iterator[Context]:
        length = self.length(subject)
        if self.texts:
            require(self.data is None, "data", self.data, "None beside texts")
            return text_contexts(self.texts, subject.tokenizer, length)
        of_the_run = subject.origin.data
        data = self.data or (None if of_the_run is None else of_the_run.valid)
        if data is None:
            raise ValueError("data: got None, expected token files (--data) or texts (--texts) for an exported model")
        if not isinstance(data, str):
            raise ValueError(f"data: got None, expected one of the run's held-out corpora (--data): {' '.join(data)}")
        vocab_size = subject.model.config.vocab_size
        return PackedContexts(data, length, seed=0, shuffle=False, vocab_size=vocab_size).one_epoch()


def by_group(subject: Subject, groups: int, scored: Iterable[tuple[Tensor, Scores]]) -> list[dict[str, Any]]:
    """Of each group its `labels`, their mean `loss` and `accuracy`, over all ranks; {} of one without labels.

    scored: the groups [N] of some labels, and what the model says of these. Raises ValueError if there is none at all.
    """
    totals = torch.zeros(3, groups, dtype=torch.float64, device=subject.world.device)
    for group, scores in scored:
        values = torch.stack([torch.ones_like(scores.losses), scores.losses, scores.right]).double()
        totals.index_add_(1, group, values)
    rows = all_ranks(totals).T.tolist()
    require(any(number for number, _, _ in rows), "data", "no label in any context", "one at least")
    return [{"labels": int(n), "loss": loss / n, "accuracy": right / n} if n else {} for n, loss, right in rows]
