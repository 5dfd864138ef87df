"""What a part of a model that runs a second time, in the backward pass, need not compute again.

`torch.utils.checkpoint` drops what such a part saved and runs it anew. Where its `Results` are kept, expensive steps in
it are skipped then: matrix products, operations over the sequence, what other ranks sent. Such a step says

    y = once(lambda: …)

inside an autograd function, so that backward's graph is the same in both runs. `runs` gives context managers for the
two, which hold for the thread that runs the part.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Results:
    """Given back in the order in which they were added, and once, so that their memory is free as soon as it can be."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._next = 0

    def add(self, result: Any) -> None:
        self._kept.append(_detached(result))

    def take(self) -> Any:
        if self._next >= len(self._kept):
            raise RuntimeError("results that were kept serve one backward pass: recompute='full' allows for more")
        result, self._kept[self._next] = self._kept[self._next], None
        self._next += 1
        return result


@dataclass(frozen=True)
class Part:
    """results: None if nothing is kept. again: this is the second run."""

    results: Results | None
    again: bool


_part: ContextVar[Part | None] = ContextVar("part", default=None)


class Run:
    """A context manager for one run of a part; may be entered again."""

    def __init__(self, part: Part):
        self.part = part
        self._outer: list[Any] = []

    def __enter__(self) -> None:
        self._outer.append(_part.set(self.part))

    def __exit__(self, *error: object) -> None:
        _part.reset(self._outer.pop())


def runs(keep: bool) -> tuple[Run, Run]:
    """For the first and the second run of a part, whose expensive steps are kept or not."""
    results = Results() if keep else None
    return Run(Part(results, again=False)), Run(Part(results, again=True))


def runs_twice() -> bool:
    """Whether this is a part that drops what it saves."""
    return _now() is not None


def is_kept() -> bool:
    """Whether this is such a part, and its expensive steps are kept."""
    part = _now()
    return part is not None and part.results is not None


def once(compute: Callable[[], Result]) -> Result:
    """compute(), a tensor or a tuple of tensors and None; in the second run, if it is kept, what the first one gave."""
    part = _now()
    if part is None or part.results is None:
        return compute()
    if part.again:
        return part.results.take()
    result = compute()
    part.results.add(result)
    return result


def _now() -> Part | None:
    return None if torch.compiler.is_compiling() else _part.get()  # what is compiled as a whole sees to itself


def _detached(result: Any) -> Any:
    """Of the same memory, but without the graph that autograd will tie to what a function returns."""
    if isinstance(result, tuple):
        return tuple(map(_detached, result))
    return result.detach() if isinstance(result, Tensor) else result
