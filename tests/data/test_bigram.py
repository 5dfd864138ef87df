"""The bigram baseline against its formula written out pair by pair."""

import math
from collections import Counter

import numpy as np
import pytest

from lasp.data import IGNORED, Context, PackedContexts, TokenFileWriter, bigram_loss

VOCAB = 6


def contexts(path, lengths, length, low=0):
    generator = np.random.default_rng()
    with TokenFileWriter(path, np.uint16) as writer:
        for size in lengths:
            writer.add_document(np.append(generator.integers(low, VOCAB - 1, size=size), VOCAB - 1))
    return PackedContexts(path, length, seed=0)


def pairs(contexts):
    for context in contexts.one_epoch():
        tokens, labels = context.tokens(0, context.length).tolist(), context.labels(0, context.length).tolist()
        yield from ((a, b) for a, b in zip(tokens, labels, strict=True) if b != IGNORED)


def test_equals_the_formula(tmp_path):
    train, valid = contexts(tmp_path / "t", [40, 9, 1, 25], 13, low=1), contexts(tmp_path / "v", [17, 30], 16)
    seen, held_out = list(pairs(train)), list(pairs(valid))
    assert any(b == VOCAB - 1 for _, b in held_out)  # documents' ends are predicted
    assert any(a == 0 for a, _ in held_out)  # and what was never seen gets a probability
    both, first, second = Counter(seen), Counter(a for a, _ in seen), Counter(b for _, b in seen)
    expected = 0.0
    for a, b in held_out:
        unigram = (second[b] + 1) / (len(seen) + VOCAB)
        expected -= math.log((both[a, b] + unigram) / (first[a] + 1)) / len(held_out)
    assert bigram_loss(train.one_epoch(), valid.one_epoch(), VOCAB) == pytest.approx(expected, abs=1e-12)


def test_the_probabilities_after_a_token_sum_to_one(tmp_path):
    train = contexts(tmp_path / "t", [200], 50)
    for a in range(VOCAB):
        total = 0.0
        for b in range(VOCAB):
            pair = Context(np.array([a, b]), np.array([0, 1]), np.array([0]), np.array([2]))
            total += math.exp(-bigram_loss(train.one_epoch(), [pair], VOCAB))
        assert total == pytest.approx(1, abs=1e-12)


def test_bad_arguments(tmp_path):
    data = contexts(tmp_path / "t", [40], 10)
    with pytest.raises(ValueError, match="vocab_size: got 5000, expected 1 to 4096"):
        bigram_loss(data.one_epoch(), data.one_epoch(), 5000)
    with pytest.raises(ValueError, match="train: got token 5, expected ids below vocab_size=5"):
        bigram_loss(data.one_epoch(), data.one_epoch(), VOCAB - 1)
    negative = Context(np.array([1, -1]), np.array([0, 2]), np.array([0]), np.array([2]))
    with pytest.raises(ValueError, match="valid: got token -1, expected ids below vocab_size=6"):
        bigram_loss(data.one_epoch(), [negative], VOCAB)
    with pytest.raises(ValueError, match="valid: got no token with a label"):
        bigram_loss(data.one_epoch(), [], VOCAB)
