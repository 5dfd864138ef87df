"""What a task is, and how its sequences become token files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from lasp.config import require
from lasp.data.indexed import TokenFileWriter, token_dtype

BLOCK = 1000  # sequences drawn at a time; another number would give other sequences


class Task(Protocol):
    """A frozen dataclass of a task's settings."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        ...

    @property
    def length(self) -> int:
        """Tokens of every sequence."""
        ...

    def sample(self, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences [N, length] of ids, and [N, length] which of their tokens are labels: some in each."""
        ...


def draw(task: Task, sequences: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """That many sequences in blocks, the same for the same task and seed."""
    for block, first in enumerate(range(0, sequences, BLOCK)):
        yield task.sample(np.random.default_rng([seed, block]), min(BLOCK, sequences - first))


def write(task: Task, prefix: str | Path, sequences: int, seed: int) -> None:
    """Writes the sequences to token files with a mask, each a document."""
    require(sequences >= 1, "sequences", sequences, "at least 1")
    with TokenFileWriter(prefix, token_dtype(task.vocab_size), masked=True) as writer:
        for tokens, mask in draw(task, sequences, seed):
            for row, labels in zip(tokens, mask, strict=True):
                writer.add_document(row, labels)
