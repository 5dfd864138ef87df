"""Selective copying: Mamba, arXiv:2312.00752 §3.1, and MAD, arXiv:2403.17844 §3.1."""

from dataclasses import dataclass

import numpy as np

from lasp.evaluation.tasks.choice import distinct
from lasp.fields import Count, check_fields, require


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """N random words at random places among blanks (the word V), then the word V + 1, then the N words in their order:
    the labels."""

    words: Count = 16  # V
    length: Count = 256
    size: Count = 16  # N

    def __post_init__(self) -> None:
        check_fields(self)
        require(2 * self.size < self.length, "size", self.size, f"less than half of length={self.length}")

    @property
    def vocab_size(self) -> int:
        return self.words + 2

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        places = self.length - self.size - 1
        text = rng.integers(self.words, size=(sequences, self.size))
        tokens = np.full((sequences, self.length), self.words)
        chosen = np.sort(distinct(rng, np.ones(places), sequences, self.size), axis=1)
        np.put_along_axis(tokens, chosen, text, 1)
        tokens[:, places] = self.words + 1
        tokens[:, places + 1 :] = text
        return tokens, np.broadcast_to(np.arange(self.length) > places, tokens.shape).astype(np.uint8)
