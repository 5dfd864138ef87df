"""The most frequent words of a list: common and frequent words extraction. RULER, arXiv:2404.06654 §3."""

from dataclasses import dataclass

import numpy as np

from lasp.evaluation.prompts.prompt import Composer, Haystack, Prompt
from lasp.evaluation.prompts.words import invented

MANY = 300_000  # words, more than any list has


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """`common` words, each `often` times, among others, each `seldom` times, in a random order; the common ones are
    asked for."""

    common: int = 10
    often: int = 30
    seldom: int = 3

    def prompt(self, composer: Composer, haystack: Haystack, length: int, rng: np.random.Generator) -> Prompt:
        words, order = _words(rng, length), rng.integers(2**32)

        def numbered(others: int) -> list[str]:
            rare = words[self.common : self.common + others]
            every = np.array(words[: self.common] * self.often + rare * self.seldom)
            np.random.default_rng(order).shuffle(every)
            return [f" {number}. {word}" for number, word in enumerate(every.tolist(), 1)]

        told = f"{self.common} most common words in the list"
        return composer.compose(
            length,
            intro="Some words come often in this list. Remember them.\n",
            fill=lambda tokens: composer.largest(numbered, tokens, 1),
            question=f"\nWhich are the {told}? The {told} are:",
            answers=words[: self.common],
        )


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """N words of which the k-th most frequent comes N k^-power / ζ(power) times, rounded down, in a random order. The
    most frequent is a row of dots, and the `asked` next ones are asked for."""

    power: float = 2.0
    asked: int = 3

    def prompt(self, composer: Composer, haystack: Haystack, length: int, rng: np.random.Generator) -> Prompt:
        words, order = ["....", *_words(rng, length)], rng.integers(2**32)
        ranks = np.arange(1, len(words) + 1, dtype=np.float64) ** -self.power
        shares = ranks / ranks.sum()

        def drawn(total: int) -> list[str]:
            every = np.repeat(np.array(words), (total * shares).astype(np.int64))
            np.random.default_rng(order).shuffle(every)
            return [f" {word}" for word in every.tolist()]

        told = f"{self.asked} most frequent words in the text, apart from the dots"
        return composer.compose(
            length,
            intro="Read this coded text and count its words. Ignore the dots.\n",
            fill=lambda tokens: composer.largest(drawn, tokens, int(4 / shares[self.asked])),
            question=f"\nWhich are the {told}? The {told}, are:",
            answers=words[1 : self.asked + 1],
        )


def _words(rng: np.random.Generator, length: int) -> list[str]:
    """More than a list of so many tokens has."""
    return invented(rng, min(MANY, length + 10))
