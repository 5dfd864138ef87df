"""Needles in texts, with questions and answers: what the needle test asks for, as something to learn from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lasp.data import Tokenizer, load_tokenizer
from lasp.evaluation.prompts.needles import intro, question, sentence
from lasp.evaluation.prompts.prompt import Composer, Haystack, endless, read_haystack
from lasp.evaluation.prompts.words import invented, numbers
from lasp.fields import Count, FilePath, check_fields, require


@dataclass(frozen=True, kw_only=True)
class NeedleTexts:
    """A text in which 1 to `keys` sentences tell a key's number, then a question about each and its answer.

    All tokens are labels, or with `answers_only` those of the answers. In front stands as much of the text, and then
    the end of a document, as gives every sequence its length.
    """

    length: Count = 1024
    keys: Count = 4
    tokenizer: FilePath = "byte"  # "byte", or the path of a tokenizer.json
    haystack: FilePath | None = None  # a file of text; Python's documentation of its language if None
    answers_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @cached_property
    def _texts(self) -> tuple[Tokenizer, Composer, Haystack]:
        tokenizer = load_tokenizer(self.tokenizer)
        return tokenizer, Composer(tokenizer), read_haystack(self.haystack)

    @property
    def vocab_size(self) -> int:
        return self._texts[0].vocab_size

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        """Raises ValueError for a length in which needles and questions do not fit."""
        rows = [self._one(rng, 1 + number % self.keys) for number in range(sequences)]
        tokens, mask = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        return tokens, mask

    def _one(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        tokenizer, composer, haystack = self._texts
        told = list(zip(invented(rng, count), numbers(rng, count), strict=True))
        asked = [told[number] for number in rng.permutation(count)]
        end, scored = list[np.ndarray](), list[np.ndarray]()
        for key, value in asked:
            for ids, is_answer in ((composer.exactly(question([key])), 0), (composer.exactly(f" {value}."), 1)):
                end.append(ids)
                scored.append(np.full(len(ids), is_answer, np.uint8))
        hidden = [(float(rng.random()), sentence(key, value)) for key, value in told]
        room = self.length - sum(map(len, end)) - 1
        used = len(composer.exactly(intro())) + sum(len(composer.exactly(text)) for _, text in hidden)
        require(used < room, "length", self.length, f"more than the {self.length - room + used} tokens of {count} keys")
        sentences = endless(haystack.sentences, int(rng.integers(len(haystack.sentences))))
        text = composer.hide(
            room, intro=intro(), fill=lambda tokens: composer.fitting(sentences, tokens), needles=hidden
        )
        front = self._front(room - len(text), sentences)
        ids = np.concatenate([front, text, *end, [tokenizer.eod]])
        if not self.answers_only:
            return ids, (np.arange(self.length) > 0).astype(np.uint8)
        return ids, np.concatenate([np.zeros(len(front) + len(text), np.uint8), *scored, [np.uint8(0)]])

    def _front(self, tokens: int, sentences: Iterator[str]) -> np.ndarray:
        """So many tokens of sentences, which end a document."""
        tokenizer, composer, _ = self._texts
        ids = np.array([tokenizer.eod], np.int64)
        while len(ids) < tokens:
            ids = np.concatenate([composer.encode(next(sentences)), ids])
        return ids[len(ids) - tokens :]
