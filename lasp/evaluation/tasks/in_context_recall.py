"""In-context recall, and the same among noise: MAD, arXiv:2403.17844 §3.1."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lasp.fields import Allowed, Count, check_fields, require

Share = Annotated[float, Allowed("a number in [0, 1)", lambda x: 0 <= x < 1)]


@dataclass(frozen=True, kw_only=True)
class InContextRecall:
    """T / 2 pairs of a key and a value; in each sequence a key always has the same value, drawn when it first comes.

    Keys are the words 0 … V/2 - 1, values V/2 … V - 1, all drawn uniformly. The labels are the values of keys that have
    come before; the last pair's key has. With noise each other pair but the first is, with that probability, two of V
    more words, V … 2 V - 1, that mean nothing.
    """

    words: Count = 16  # V: keys and values
    length: Count = 128
    noise: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.words >= 2 and self.words % 2 == 0, "words", self.words, "an even number, at least 2")
        require(self.length >= 4 and self.length % 2 == 0, "length", self.length, "an even number, at least 4")

    @property
    def vocab_size(self) -> int:
        return self.words * (2 if self.noise else 1)

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        half, shape = self.words // 2, (sequences, self.length // 2)
        keys, rows = rng.integers(half, size=shape), np.arange(sequences)
        noisy = rng.random(shape) < self.noise
        noisy[:, [0, -1]] = False
        earlier = np.where(noisy, -1.0, rng.random(shape))[:, :-1].argmax(1)
        keys[:, -1] = keys[rows, earlier]
        values = half + np.take_along_axis(rng.integers(half, size=(sequences, half)), keys, 1)
        places = np.arange(shape[1])
        known = _seen_before(np.where(noisy, half + places, keys))  # noise is nothing that comes again
        pairs = np.stack([keys, values], axis=2)
        if self.noise:
            pairs = np.where(noisy[..., None], rng.integers(self.words, 2 * self.words, size=pairs.shape), pairs)
        mask = np.stack([np.zeros_like(known), known], axis=2)
        return pairs.reshape(sequences, -1), mask.reshape(sequences, -1).astype(np.uint8)


def _seen_before(words: np.ndarray) -> np.ndarray:
    """[N, T] bool: whether a word stands further left in its row."""
    order = np.argsort(words, axis=1, kind="stable")
    ordered = np.take_along_axis(words, order, 1)
    again = np.zeros(words.shape, bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    return again
