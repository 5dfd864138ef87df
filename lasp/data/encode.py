"""Texts of any length become ids in constant memory, on all cores: their parts are encoded in batches, by processes.

A tokenizer may need to see what is around a token. So a part that goes on a text begins with the end of the one before,
`overlap` characters, which both encode; where they give the same tokens all through the middle of what they share,
one's tokens are followed by the other's. Parts that do not agree are encoded together.
"""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from lasp.config import require
from lasp.data.tokenizer import Tokenizer

BATCH = 1 << 19  # characters
Ids = tuple[np.ndarray, np.ndarray | None]  # of a text, and at which of its characters they begin
_mine: Tokenizer


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
                (encoded,) = _join([window], _encode(tokenizer, [window.text], [True]))
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
    batches = _batches(windows)
    first = list(islice(batches, 2))
    if len(first) < 2 or tokenizer.cheap:
        for batch in chain(first, batches):
            yield from _join(batch, _encode(tokenizer, *_asked(batch)))
        return
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # Forked ones start at once, but only Linux's libraries bear it.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, _take, (tokenizer,)) as pool:
        pending: deque[tuple[list[Window], Future[list[Ids]]]] = deque()
        for batch in chain(first, batches):
            pending.append((batch, pool.submit(_encode_here, *_asked(batch))))
            if len(pending) > workers:
                done, future = pending.popleft()
                yield from _join(done, future.result())
        for done, future in pending:
            yield from _join(done, future.result())


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


def _asked(windows: list[Window]) -> tuple[list[str], list[bool]]:
    """The texts, and of which it is asked where their tokens begin."""
    return [window.text for window in windows], [window.start > 0 or not window.last for window in windows]


def _encode(tokenizer: Tokenizer, texts: Sequence[str], with_starts: Sequence[bool]) -> list[Ids]:
    parts, wholes = (
        [text for text, a in zip(texts, with_starts, strict=True) if a == asked] for asked in (True, False)
    )
    of_parts = iter(tokenizer.encode_with_starts(parts) if parts else ())
    of_wholes = iter(tokenizer.encode_batch(wholes) if wholes else ())
    return [next(of_parts) if asked else (next(of_wholes), None) for asked in with_starts]


def _join(windows: list[Window], encoded: list[Ids]) -> list[Encoded]:
    return [
        Encoded(window, ids, np.zeros_like(ids) if starts is None else starts + window.start)
        for window, (ids, starts) in zip(windows, encoded, strict=True)
    ]


def _take(tokenizer: Tokenizer) -> None:
    """Makes it the tokenizer of this process, which is one of several."""
    global _mine
    _mine = tokenizer


def _encode_here(texts: Sequence[str], with_starts: Sequence[bool]) -> list[Ids]:
    return _encode(_mine, texts, with_starts)
