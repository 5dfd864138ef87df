"""Sequence parallelism: everything that knows there is more than one rank."""

from lasp.parallel.context import Sequence, SequenceParallel

__all__ = ["Sequence", "SequenceParallel"]
