"""Sequence parallelism: everything that knows there is more than one rank."""

from lasp.parallel.apply import parallelize, reduce_gradients
from lasp.parallel.groups import leave
from lasp.parallel.sequence import Sequence
from lasp.parallel.sequence_parallel import SequenceParallel
from lasp.parallel.stream import Segment, Stream

__all__ = ["Segment", "Sequence", "SequenceParallel", "Stream", "leave", "parallelize", "reduce_gradients"]
