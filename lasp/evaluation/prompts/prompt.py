"""A prompt: a text in tokens, and what an answer to the question at its end has to say."""

import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np

from lasp.config import require
from lasp.data import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LONGEST = 40  # words of a sentence; longer ones are divided
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Prompt:
    """answers: texts that are looked for in what the model writes, in up to `room` tokens, after `ids` [tokens].
    expected: how a right answer is likely to begin, in tokens."""

    ids: np.ndarray
    answers: tuple[str, ...]
    room: int
    expected: np.ndarray

    def score(self, written: str) -> float:
        """The part of the answers that the text contains, in any case of letters (RULER, arXiv:2404.06654)."""
        return sum(answer.lower() in written.lower() for answer in self.answers) / len(self.answers)


class Haystack:
    """Sentences to hide things in, again and again: noise (arXiv:2305.16300), or those of a text."""

    def __init__(self, text: str):
        words = [sentence.split() for sentence in SENTENCE_END.split(text)]
        parts = [some[i : i + LONGEST] for some in words for i in range(0, len(some), LONGEST)]
        self.sentences = [" " + " ".join(part) for part in parts]
        require(bool(self.sentences), "haystack", text[:80], "a text with sentences")


@cache
def topics() -> str:
    """A text that every machine has: Python's documentation of its language."""
    from pydoc_data.topics import topics

    return " ".join(text for _, text in sorted(topics.items()))


def read_haystack(path: str | None) -> Haystack:
    """Of a file of UTF-8 text; of Python's documentation if None. Raises ValueError for what is no text."""
    if path is None:
        return Haystack(topics())
    try:
        return Haystack(Path(path).read_bytes().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack: got {path} ({error}), expected UTF-8") from error


class Composer:
    """Puts prompts together, piece by piece in tokens, so that they have the length asked for with any tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.encode = cache(tokenizer.encode)

    def exactly(self, text: str) -> np.ndarray:
        """The tokens of a text. Raises ValueError if the tokenizer loses something of it."""
        ids = self.encode(text)
        back = self.tokenizer.decode(ids)
        same = "".join(back.split()) == "".join(text.split())
        require(same, "tokenizer", f"{back[:80]!r} for {text[:80]!r}", "one whose tokens give a text back")
        return ids

    def compose(
        self,
        length: int,
        *,
        intro: str,
        fill: Callable[[int], Iterable[str]],
        needles: Sequence[tuple[float, str]] = (),
        question: str,
        answers: Sequence[str],
    ) -> Prompt:
        """intro, fillers with the needles among them, question; with an answer's tokens at most `length`.

        fill: the fillers that have at most so many tokens. needles: (depth, text), depth 0 before all fillers, 1 after
        them. Raises ValueError if even without fillers it is longer than length.
        """
        last, expected = self.exactly(question), self.exactly(" " + ", ".join(answers))
        room = 2 * len(expected)  # for some words around the answers
        end = len(last) + room
        used = end + len(self.exactly(intro)) + sum(len(self.exactly(text)) for _, text in needles)
        require(used < length, "lengths", length, f"more than the {used} tokens of the task without a text around it")
        ids = np.concatenate([self.hide(length - end, intro=intro, fill=fill, needles=needles), last])
        return Prompt(ids, tuple(answers), room, expected)

    def hide(
        self,
        tokens: int,
        *,
        intro: str,
        fill: Callable[[int], Iterable[str]],
        needles: Sequence[tuple[float, str]],
    ) -> np.ndarray:
        """intro and fillers with the needles among them, as in `compose`: at most so many tokens, of which intro and
        needles may be all."""
        hidden = [(depth, self.exactly(text)) for depth, text in needles]
        first = self.exactly(intro)
        pieces = [self.encode(text) for text in fill(tokens - len(first) - sum(len(ids) for _, ids in hidden))]
        borders = np.cumsum([0, *map(len, pieces)])
        for depth, ids in sorted(hidden, key=lambda needle: needle[0], reverse=True):
            pieces.insert(int(np.abs(borders - depth * borders[-1]).argmin()), ids)
        return np.concatenate([first, *pieces]).astype(np.int64)

    def fitting(self, texts: Iterable[str], tokens: int) -> Iterator[str]:
        """As many of the texts, from the first on, as have at most so many tokens."""
        for text in texts:
            tokens -= len(self.encode(text))
            if tokens < 0:
                return
            yield text

    def largest(self, make: Callable[[int], list[str]], tokens: int, least: int) -> list[str]:
        """make(n) for the largest n whose texts have at most so many tokens. Raises ValueError if `least` is too large.

        More of n must be more texts.
        """

        def fits(n: int) -> bool:
            return sum(len(self.encode(text)) for text in make(n)) <= tokens

        require(fits(least), "lengths", f"{tokens} tokens for a list", f"room for its {len(make(least))} words")
        most = 2 * least
        while fits(most):
            most *= 2
        return make(bisect(range(least, most), False, key=lambda n: not fits(n)) - 1 + least)


def endless(sentences: Sequence[str], start: int = 0) -> Iterator[str]:
    """The sentences in a circle, from one of them on."""
    return cycle([*sentences[start:], *sentences[:start]])
