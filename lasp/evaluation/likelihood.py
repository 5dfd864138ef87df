"""How likely a model finds continuations of contexts: many together, as packed documents, without padding."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from lasp.evaluation.score import score
from lasp.evaluation.subject import Subject
from lasp.models.loss import IGNORE, require_ids


def log_likelihoods(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """For each context and continuation, of at least one token each: log p(continuation | context) in nats, and whether
    every token of it is the likeliest one. The same on every rank.

    Raises ValueError for ids outside the vocabulary.
    """
    device = subject.world.device
    documents = [torch.tensor([*context, *continuation]) for context, continuation in pairs]
    tokens, labels = torch.cat(documents), torch.full((sum(map(len, documents)),), IGNORE)
    require_ids("tokens", tokens, subject.model.config.vocab_size)
    offsets = [0, *accumulate(map(len, documents))]
    owners = torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor([len(document) for document in documents]))
    for stop, (_, continuation) in zip(offsets[1:], pairs, strict=True):
        labels[stop - 1 - len(continuation) : stop - 1] = tokens[stop - len(continuation) : stop]

    seq = subject.sp.sequence(len(tokens), torch.tensor(offsets))
    local, targets, owner = (seq.shard(x.to(device), dim=0) for x in (tokens, labels, owners))
    scores = score(subject.model, local[None], targets[None], seq)
    sums = torch.zeros(2, len(pairs), dtype=torch.float64, device=device)
    found = torch.stack([-scores.losses.double(), (~scores.right).double()])
    sums.index_add_(1, owner[scores.places[:, 1]], found)
    likelihoods, wrong = seq.sum(sums).tolist()
    return [(likelihood, errors == 0) for likelihood, errors in zip(likelihoods, wrong, strict=True)]
