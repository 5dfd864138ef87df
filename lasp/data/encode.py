"""Texts of any length become ids in constant memory, on all cores: their parts are encoded in batches.

A tokenizer may need to see what is around a token. So a part that goes on a text begins with the end of the one before,
`overlap` characters, which both encode; where they give the same tokens all through the middle of what they share,
one's tokens are followed by the other's. Parts that do not agree are encoded together.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lasp.config import require
from lasp.data.tokenizer import Tokenizer

BATCH = 1 << 19  # characters
IN_FLIGHT = 2  # batches: while the ids of one become an array another is encoded


@dataclass(frozen=True)
class Window:
    """A part of a text, after what it shares with the part before: the characters from `start` on."""

    key: Any
    text: str
    start: int
    last: bool

    @property
    def stop(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Encoded:
    """A window's ids [tokens], and at which character of the text each begins (0 if the window is all of it)."""

    window: Window
    ids: np.ndarray
    starts: np.ndarray

    def between(self, begin: int, end: int) -> np.ndarray:
        """The ids of the tokens that begin there."""
        return self.ids[self._slice(begin, end)]

    def agrees(self, other: "Encoded", begin: int, end: int) -> bool:
        """Whether both have the same tokens there."""
        mine, theirs = self._slice(begin, end), other._slice(begin, end)
        return np.array_equal(self.starts[mine], other.starts[theirs]) and np.array_equal(
            self.ids[mine], other.ids[theirs]
        )

    def _slice(self, begin: int, end: int) -> slice:
        return slice(*np.searchsorted(self.starts, (begin, end)))


def encode_all(
    tokenizer: Tokenizer, texts: Iterable[tuple[Any, Iterator[str]]]
) -> Iterator[tuple[Any, np.ndarray, bool]]:
    """(key, ids, whether they are the text's last) for every (key, parts of a text), in their order.

    Put together, a text's ids are those of `tokenizer.encode` for the whole of it. Its parts but the last are longer
    than the tokenizer's overlap. Raises ValueError for a tokenizer whose tokens depend on what is farther away.
    """
    quarter = tokenizer.overlap // 4
    held: Encoded | None = None
    done = 0  # the tokens before this character are out
    for encoded in _encoded(tokenizer, _windows(texts, tokenizer.overlap)):
        window = encoded.window
        if held is not None:
            middle = window.start + 2 * quarter
            if held.agrees(encoded, middle - quarter, middle + quarter):
                yield window.key, held.between(done, middle), False
                done = middle
            else:
                text = held.window.text + window.text[held.window.stop - window.start :]
                window = Window(window.key, text, held.window.start, window.last)
                (encoded,) = _encode_parts(tokenizer, [window])
                same = held.agrees(encoded, done - quarter, done + quarter)
                require(same, "tokenizer", "tokens that depend on what is far away", "one that reads texts in parts")
        if window.last:
            yield window.key, encoded.between(done, window.stop), True
            held, done = None, 0
        else:
            held = encoded


def _windows(texts: Iterable[tuple[Any, Iterator[str]]], overlap: int) -> Iterator[Window]:
    for key, parts in texts:
        text, start = next(parts, ""), 0
        for part in parts:
            kept = len(text) - overlap
            if _repeats(text[kept + overlap // 4 : len(text) - overlap // 4]):
                text += part
            else:
                yield Window(key, text, start, last=False)
                start += kept
                text = text[kept:] + part
        yield Window(key, text, start, last=True)


def _repeats(text: str) -> bool:
    """Whether it is one short text over and over, whose tokens may depend on where that begins and ends."""
    return any(text.startswith(text[period:]) for period in range(1, len(text) // 4 + 1))


def _encoded(tokenizer: Tokenizer, windows: Iterator[Window]) -> Iterator[Encoded]:
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        pending: deque[Future[list[Encoded]]] = deque()
        for batch in _batches(windows):
            pending.append(pool.submit(_encode, tokenizer, batch))
            if len(pending) == IN_FLIGHT:
                yield from pending.popleft().result()
        for future in pending:
            yield from future.result()


def _batches(windows: Iterator[Window]) -> Iterator[list[Window]]:
    batch: list[Window] = []
    size = 0
    for window in windows:
        batch.append(window)
        size += len(window.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, windows: list[Window]) -> list[Encoded]:
    if any(window.start > 0 or not window.last for window in windows):
        return _encode_parts(tokenizer, windows)
    encoded = zip(windows, tokenizer.encode_batch([window.text for window in windows]), strict=True)
    return [Encoded(window, ids, np.zeros_like(ids)) for window, ids in encoded]


def _encode_parts(tokenizer: Tokenizer, windows: list[Window]) -> list[Encoded]:
    encoded = zip(windows, tokenizer.encode_with_starts([window.text for window in windows]), strict=True)
    return [Encoded(window, ids, starts + window.start) for window, (ids, starts) in encoded]
