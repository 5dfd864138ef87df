"""Multi-query associative recall, MQAR: Zoology, arXiv:2312.04927, appendix."""

from dataclasses import dataclass

import numpy as np

from lasp.evaluation.tasks.choice import distinct, distinct_uniform
from lasp.fields import Count, Positive, check_fields, require


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """D pairs of a key and a value, then each key once more, somewhere, with its value behind it: the labels.

    Keys are D different words of 1 … V/2 - 1, values D different ones of V/2 … V - 1. What follows the pairs is cut
    into (T - 2 D) / 2 places of two words; the keys, in their order, take places drawn without replacement with
    probabilities ∝ a j^(a - 1) for place j = 1, 2, …: for a < 1 early ones are likelier. All other places hold words
    drawn from the whole vocabulary.

    Zoology has such a random word also in the value's place behind a queried key.
    """

    vocab_size: Count = 8192
    length: Count = 256
    pairs: tuple[Count, ...] = (4, 8, 16, 32, 64)  # sequence i has pairs[i modulo how many there are]
    power: Positive = 0.01  # a

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.pairs) > 0, "pairs", self.pairs, "at least one number")
        require(self.length % 2 == 0, "length", self.length, "an even number")
        most = max(self.pairs)
        require(4 * most <= self.length, "pairs", most, f"at most length / 4 = {self.length // 4}")
        require(most < self.vocab_size // 2, "pairs", most, f"fewer than vocab_size / 2 = {self.vocab_size // 2}")

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(self.vocab_size, size=(sequences, self.length))
        mask = np.zeros((sequences, self.length), np.uint8)
        kinds = np.arange(sequences) % len(self.pairs)
        for kind, pairs in enumerate(self.pairs):
            self._fill(rng, tokens, mask, np.flatnonzero(kinds == kind), pairs)
        return tokens, mask

    def _fill(
        self, rng: np.random.Generator, tokens: np.ndarray, mask: np.ndarray, rows: np.ndarray, pairs: int
    ) -> None:
        half = self.vocab_size // 2
        keys = 1 + distinct_uniform(rng, half - 1, len(rows), pairs)
        values = half + distinct_uniform(rng, self.vocab_size - half, len(rows), pairs)
        places = np.arange(1, (self.length - 2 * pairs) // 2 + 1, dtype=np.float64)
        asked = 2 * pairs + 2 * distinct(rng, places ** (self.power - 1), len(rows), pairs)
        both = np.stack([keys, values], axis=2).reshape(len(rows), 2 * pairs)
        tokens[rows, : 2 * pairs] = both
        tokens[rows[:, None], asked], tokens[rows[:, None], asked + 1] = keys, values
        mask[rows[:, None], asked + 1] = 1
