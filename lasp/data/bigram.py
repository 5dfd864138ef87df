"""The held-out loss of a bigram model: what a language model must beat to have learnt more than pairs of tokens."""

from collections.abc import Iterable

import numpy as np

from lasp.data.packed import IGNORED, Context

MAX_VOCAB = 4096  # the counts are a dense square
PRIOR = 1.0  # the weight of the unigram distribution, in tokens


def bigram_loss(train: Iterable[Context], valid: Iterable[Context], vocab_size: int) -> float:
    """Nats per token of a bigram model that counted `train`, over every position of `valid` that has a label.

    The positions are those of a model's loss on the same contexts: the next token of the document, its end included.
    With n(a, b) the training pairs, p(b | a) = (n(a, b) + k p(b)) / (n(a) + k), k = 1, and p(b) = (n(b) + 1) / (n + V):
    the Dirichlet prior of MacKay & Peto 1995. Raises ValueError for a vocabulary above 4096, ids outside it, no labels.
    """
    if not 1 <= vocab_size <= MAX_VOCAB:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {MAX_VOCAB} for a table of bigrams")
    seen, held_out = (_pairs(name, contexts, vocab_size) for name, contexts in (("train", train), ("valid", valid)))
    unigram = (seen.sum(0) + 1) / (seen.sum() + vocab_size)
    conditional = (seen + PRIOR * unigram) / (seen.sum(1, keepdims=True) + PRIOR)
    return float(-(held_out * np.log(conditional)).sum() / held_out.sum())


def _pairs(name: str, contexts: Iterable[Context], vocab_size: int) -> np.ndarray:
    """How often each token (row) was followed by each (column), int64 [V, V]."""
    counts = np.zeros(vocab_size**2, dtype=np.int64)
    for context in contexts:
        tokens, labels = context.tokens(0, context.length).numpy(), context.labels(0, context.length).numpy()
        scored = labels != IGNORED
        first, second = tokens[scored], labels[scored]
        ids = np.concatenate([first, second])
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: got token {outside[0]}, expected ids below vocab_size={vocab_size}")
        pairs, times = np.unique(first * vocab_size + second, return_counts=True)
        counts[pairs] += times
    if not counts.any():
        raise ValueError(f"{name}: got no token with a label, expected at least one")
    return counts.reshape(vocab_size, vocab_size)
