"""Megatron's batches as lasp's sequences: the same context-parallel group, the same zigzag split."""

from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from lasp.config import require
from lasp.parallel import Sequence, SequenceParallel, leave
from lasp.parallel.documents import DocumentSequence

_BATCHES_KEPT = 16  # packed ones: as many as a pipeline may have in flight


class ContextParallel:
    """The sequences that are split over one context-parallel group, made once per length or packed batch.

    Megatron cuts a sequence (thd: every document) into 2 · CP chunks and gives rank r the chunks r and 2 · CP - 1 - r:
    that is lasp's zigzag layout, so that nothing has to move.
    """

    def __init__(self, group: Any):
        self.size = group.size()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        if self.size == 1:
            self.parallel = SequenceParallel(None, device=device)
        else:
            self.parallel = SequenceParallel(group, layout="zigzag", device=device)
        self._dense: dict[int, Sequence] = {}
        self._packed: dict[int, tuple[Any, Sequence]] = {}

    def sequence(self, local_tokens: int, packed: Any = None) -> Sequence:
        """The batch of which this rank holds `local_tokens` tokens a row.

        Args:
            packed: Megatron's PackedSeqParams in thd format. Documents are cut as `cu_seqlens_q_padded` says, or
                `cu_seqlens_q` where there is none.

        Raises:
            ValueError: a length that is not a multiple of 2 · CP, packed batches in another format, documents that do
                not make up the batch.
        """
        if packed is None:
            if local_tokens not in self._dense:
                expected = f"a multiple of 2 · context_parallel_size = {2 * self.size}"
                tokens = local_tokens * self.size
                require(self.size == 1 or local_tokens % 2 == 0, "sequence length", tokens, expected)
                self._dense[local_tokens] = self.parallel.sequence(tokens)
            return self._dense[local_tokens]
        kept = self._packed.get(id(packed))
        if kept is None or kept[0] is not packed:
            if len(self._packed) == _BATCHES_KEPT:
                self._packed.pop(next(iter(self._packed)))
            kept = self._packed[id(packed)] = packed, self._make_packed(local_tokens, packed)
        return kept[1]

    def _make_packed(self, local_tokens: int, packed: Any) -> Sequence:
        require(packed.qkv_format == "thd", "packed_seq_params.qkv_format", packed.qkv_format, "'thd'")
        size = getattr(packed, "local_cp_size", None)
        require(size in (None, self.size), "packed_seq_params.local_cp_size", size, f"{self.size} or None")
        padded: Tensor | None = packed.cu_seqlens_q_padded
        offsets = packed.cu_seqlens_q if padded is None else padded
        tokens = local_tokens * self.size
        last = int(offsets[-1])
        require(last == tokens, "packed_seq_params.cu_seqlens", last, f"{tokens}, the tokens of the batch, at its end")
        if self.size == 1:
            return self.parallel.sequence(tokens, offsets)
        return DocumentSequence(self.parallel, offsets)


@lru_cache(maxsize=64)
def context_parallel(group: Any) -> ContextParallel:
    """The one of this process group, shared by all its layers."""
    return ContextParallel(group)


def leave_mesh() -> None:
    """Ends this process's groups, Megatron's among them, once every rank has come here."""
    parallel_state.destroy_model_parallel()
    context_parallel.cache_clear()
    leave()


def shard_batch(batch: dict[str, Tensor], group: Any, packed: Any = None) -> dict[str, Tensor]:
    """This rank's tokens of every [b, s] tensor of a batch, as Megatron splits them; needs no TransformerEngine.

    Args:
        batch: tokens, labels, positions, loss masks: all [b, s], the same on every rank of the group. Labels must have
            been shifted. None values and masks of attention (which lasp's layers do not read) do not belong here.
        group: the context-parallel process group.
        packed: PackedSeqParams in thd format; then b = 1.

    Raises:
        ValueError: s, or the length of a document, is not a multiple of 2 · CP.
    """
    context = context_parallel(group)
    length = next(iter(batch.values())).shape[1]
    expected = f"a multiple of {context.size} context-parallel ranks, times 2 if there are several"
    require(length % context.size == 0, "sequence length", length, expected)
    seq = context.sequence(length // context.size, packed)
    return {name: seq.shard(x) for name, x in batch.items()}
