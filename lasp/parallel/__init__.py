"""Sequence parallelism: everything that knows there is more than one rank."""

from lasp.parallel.context import Sequence, SequenceParallel
from lasp.parallel.groups import leave

__all__ = ["Sequence", "SequenceParallel", "leave"]
