"""Fuzzy in-context recall, whose keys and values have several words: MAD, arXiv:2403.17844 §3.1."""

from dataclasses import dataclass

import numpy as np

from lasp.fields import Count, check_fields, require


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall:
    """As in-context recall, but keys and values are 1 to `longest` words each.

    Each sequence has a dictionary of its own: `pairs` keys and their values, lengths and words uniform, of which no key
    is the beginning of another, so that it is always known where one ends. Entries are drawn from it until no further
    one fits; the rest, in front, is filled with the word V. Keys are of the words 0 … V/2 - 1, values of V/2 … V - 1.
    The labels are all words of the values of keys that have come before.
    """

    words: Count = 16  # V: keys and values
    length: Count = 128
    longest: Count = 3
    pairs: Count = 6

    def __post_init__(self) -> None:
        check_fields(self)
        half = self.words // 2
        require(self.words % 2 == 0 and half >= 2, "words", self.words, "an even number, at least 4")
        require(self.pairs <= half, "pairs", self.pairs, f"at most words / 2 = {half}")
        needed = 2 * self.longest * (self.pairs + 1)
        require(self.length >= needed, "length", self.length, f"at least 2 · longest · (pairs + 1) = {needed}")

    @property
    def vocab_size(self) -> int:
        return self.words + 1

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((sequences, self.length), self.words)
        mask = np.zeros((sequences, self.length), np.uint8)
        for row in range(sequences):
            ids, labels = self._one(rng)
            tokens[row, self.length - len(ids) :], mask[row, self.length - len(ids) :] = ids, labels
        return tokens, mask

    def _one(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        half = self.words // 2
        keys: list[tuple[int, ...]] = []
        while len(keys) < self.pairs:
            key = self._word(rng, 0)
            if not any(key[: len(other)] == other[: len(key)] for other in keys):
                keys.append(key)
        values = [self._word(rng, half) for _ in keys]
        ids: list[int] = []
        labels: list[int] = []
        known = set()
        for entry in rng.integers(self.pairs, size=self.length).tolist():
            key, value = keys[entry], values[entry]
            if len(ids) + len(key) + len(value) > self.length:
                break
            ids += key + value
            labels += [0] * len(key) + [int(entry in known)] * len(value)
            known.add(entry)
        return ids, labels

    def _word(self, rng: np.random.Generator, first: int) -> tuple[int, ...]:
        size = rng.integers(1, self.longest + 1)
        return tuple((first + rng.integers(self.words // 2, size=size)).tolist())
