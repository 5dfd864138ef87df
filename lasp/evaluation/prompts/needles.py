"""Needles in a haystack: values that are told for keys somewhere in a long text. RULER, arXiv:2404.06654 §3."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lasp.evaluation.prompts.prompt import NOISE, Composer, Haystack, Prompt, endless
from lasp.evaluation.prompts.words import WORDS

SHORTEST = 8  # tokens of a sentence that tells a value, at least


@dataclass(frozen=True, kw_only=True)
class Needles:
    """`keys` keys with `values` values each, each in a sentence of its own; all values of `queries` keys are asked for.

    Around them are sentences of noise, of a text, or of other needles.
    """

    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "word"
    value: str = "number"
    around: str = "text"

    def prompt(
        self, composer: Composer, haystack: Haystack, length: int, rng: np.random.Generator, depth: float | None = None
    ) -> Prompt:
        """depth: of the first value that is asked for; others, and it if None, are anywhere."""
        others = length // SHORTEST if self.around == "needles" else 0
        keys = WORDS[self.key](rng, self.keys + others)
        values = WORDS[self.value](rng, self.keys * self.values + others)
        own = [(key, value) for n, key in enumerate(keys[: self.keys]) for value in self._of(values, n)]
        depths = sorted(rng.random(len(own)).tolist()) if depth is None else [depth, *rng.random(len(own) - 1).tolist()]
        asked = keys[: self.queries]
        answers = [value for n in range(self.queries) for value in self._of(values, n)]
        distractors = zip(keys[self.keys :], values[self.keys * self.values :], strict=True)
        around = self._around(haystack, rng, [sentence(*pair, self.value) for pair in distractors])
        return composer.compose(
            length,
            intro=intro(self.value),
            fill=lambda tokens: composer.fitting(around, tokens),
            needles=[(where, sentence(*pair, self.value)) for where, pair in zip(depths, own, strict=True)],
            question=question(asked, self.value),
            answers=answers,
        )

    def _of(self, values: Sequence[str], key: int) -> Sequence[str]:
        return values[key * self.values : (key + 1) * self.values]

    def _around(self, haystack: Haystack, rng: np.random.Generator, distractors: list[str]) -> Iterable[str]:
        if self.around == "needles":
            return distractors
        sentences = Haystack(NOISE).sentences if self.around == "noise" else haystack.sentences
        return islice(endless(sentences, int(rng.integers(len(sentences)))), None)


def intro(kind: str = "number") -> str:
    return f"Some special {kind}s are hidden in this text. Remember them.\n"


def sentence(key: str, value: str, kind: str = "number") -> str:
    return f" One of the special {kind}s for {key} is: {value}."


def question(keys: Sequence[str], kind: str = "number") -> str:
    told = f"special {kind}s for {_listed(keys)} in the text"
    return f"\nWhat are the {told}? The {told} are:"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
