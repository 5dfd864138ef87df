"""Compression: all of a random text has to be kept; after MAD, arXiv:2403.17844 §3.1."""

from dataclasses import dataclass

import numpy as np

from lasp.fields import Count, check_fields


@dataclass(frozen=True, kw_only=True)
class Compression:
    """N random words, the word V, and the N words again: the labels.

    MAD gives the output at the word V to a decoder of its own, which has to write down the text; here the model does it
    with whatever it remembers.
    """

    words: Count = 16  # V
    size: Count = 32  # N

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def vocab_size(self) -> int:
        return self.words + 1

    @property
    def length(self) -> int:
        return 2 * self.size + 1

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        text = rng.integers(self.words, size=(sequences, self.size))
        tokens = np.concatenate([text, np.full((sequences, 1), self.words), text], axis=1)
        return tokens, np.broadcast_to(np.arange(self.length) > self.size, tokens.shape).astype(np.uint8)
