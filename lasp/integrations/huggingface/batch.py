"""Where the tokens of a batch are, and which of them form a document: masks, positions and offsets, all in one.

A recurrent state has no place for padding, so tokens are taken out of their columns and put one behind the other. For
the same reason every way to say where documents begin must say the same.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.config import require
from lasp.integrations.huggingface.cache import RecurrentCache
from lasp.models import Rows
from lasp.models.loss import IGNORE
from lasp.parallel import SequenceParallel

DOCUMENTS = ("cache_position", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Batch:
    """B rows of T columns.

    valid: [B, T] bool, which columns hold tokens. starts: [N] bool, which of the N tokens begin a document; the first
    of a row always does.
    """

    def __init__(self, valid: Tensor, starts: Tensor):
        self.valid, self.starts = valid, starts
        self.full = bool(valid.all())
        self.packed = int(starts.sum()) > int(valid.any(1).sum())

    @cached_property
    def plain(self) -> bool:
        """Every row is one document and has no padding."""
        return self.full and not self.packed

    def sequence(self, cache: RecurrentCache | None) -> Any:
        """What the decoder gets as `seq`."""
        device = self.valid.device
        if self.plain:
            return SequenceParallel(None, device=device).sequence(self.valid.shape[1])
        if cache is not None:
            return Rows(self.valid.sum(1).tolist(), device)
        offsets = F.pad(self.starts.nonzero()[:, 0], (0, 1), value=len(self.starts)).cpu()
        return SequenceParallel(None, device=device).sequence(len(self.starts), offsets)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...], the tokens alone; x itself if the batch is plain."""
        return x if self.plain else x[self.valid][None]

    def unpack(self, x: Tensor, fill: int = 0) -> Tensor:
        """The inverse, with `fill` where there is no token."""
        if self.plain:
            return x
        columns = x.new_full((*self.valid.shape, *x.shape[2:]), fill)
        columns[self.valid] = x[0]
        return columns

    def next_labels(self, labels: Tensor) -> Tensor:
        """labels [B, T] -> the same of the next token in the row, -100 where there is none."""
        if self.full:
            return F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        shifted = F.pad(labels[self.valid][1:], (0, 1), value=IGNORE)
        return self.unpack(shifted.where(~_first_of_rows(self.valid).roll(-1), IGNORE)[None], IGNORE)


def read_batch(
    shape: torch.Size,
    device: torch.device,
    cache: RecurrentCache | None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache_position: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Batch:
    """The batch that forward's arguments describe, [B, T] after what is in the cache.

    attention_mask: [B, columns], those of the cache first. position_ids: [B, T], from 0 in each document. seq_idx:
    [B, T], equal within a document. cu_seq_lens_q, cu_seq_lens_k: where the documents of one row begin and the last
    ends; max_length_q, max_length_k: at least the longest one's length. cache_position: [T], the columns' indices.

    Raises ValueError, naming the argument, for what is no mask of columns, positions that leave one out, documents
    that the arguments disagree on, or that would have to share a row of the cache.
    """
    valid = _valid(attention_mask, shape, device, cache)
    first = _first_of_rows(valid)
    found: dict[str, Tensor] = {}
    if position_ids is not None:
        found["position_ids"] = _starts_of_positions(position_ids, valid, first, cache)
    if cache_position is not None:
        past = 0 if cache is None else cache.columns
        columns = torch.arange(past, past + shape[1])
        same = is_integers(cache_position) and torch.equal(cache_position.cpu().long(), columns)
        require(same, "cache_position", "other columns", f"integers {past} to {past + shape[1] - 1}")
    if seq_idx is not None:
        _require_integers("seq_idx", seq_idx, shape)
        found["seq_idx"] = _changes(seq_idx.expand(shape)[valid], first)
    for name, offsets in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if offsets is not None:
            found[name] = _changes(_documents(name, offsets, shape)[valid], first)
    starts = next(iter(found.values()), first)
    for name, other in found.items():
        agree = torch.equal(other, starts)
        require(agree, name, _lengths(other), f"documents of {_lengths(starts)} tokens, as {next(iter(found))} says")
    batch = Batch(valid, starts)
    require(cache is None or not batch.packed, "use_cache", "packed documents", "one document in each row to remember")
    for name, most in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        longest = max(_lengths(starts)) if most is not None else 0
        require(most is None or int(most) >= longest, name, most, f"at least {longest}, the longest document")
    return batch


def _valid(mask: Tensor | None, shape: torch.Size, device: torch.device, cache: RecurrentCache | None) -> Tensor:
    """[B, T] bool: which of the new columns hold tokens."""
    past = 0 if cache is None else cache.columns
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    expected = [shape[0], past + shape[1]]
    meaning = f"[batch, columns] = {expected} of ones, and zeros at padding"
    require(isinstance(mask, Tensor), "attention_mask", type(mask).__name__, meaning)
    require(list(mask.shape) == expected, "attention_mask", list(mask.shape), meaning)
    whole = mask.to(device, torch.bool)
    require(bool((mask.to(device) == whole).all()), "attention_mask", "other values", meaning)
    if cache is not None and past:
        seen = torch.ones_like(whole[:, :past]) if cache.seen is None else cache.seen.to(device)
        same = torch.equal(whole[:, :past], seen)
        require(same, "attention_mask", "another mask than the cache has seen", "the same for the columns in it")
    valid = whole[:, past:]
    require(bool(valid.any()), "attention_mask", "only zeros", "a token at least")
    return valid


def _first_of_rows(valid: Tensor) -> Tensor:
    """[N] bool: the first token of each row."""
    rows = valid.nonzero()[:, 0]
    return _changes(rows, torch.zeros_like(rows, dtype=torch.bool))


def _changes(values: Tensor, first: Tensor) -> Tensor:
    """[N] bool: where a value differs from the one before, and where `first` says so."""
    return first | F.pad(values[1:] != values[:-1], (1, 0), value=True)


def _starts_of_positions(positions: Tensor, valid: Tensor, first: Tensor, cache: RecurrentCache | None) -> Tensor:
    """Documents begin at the positions 0; what a row has in the cache is the beginning of its first one."""
    _require_integers("position_ids", positions, valid.shape)
    packed = positions.to(valid.device).expand(valid.shape)[valid]
    starts = first | (packed == 0)
    place = torch.arange(len(packed), device=valid.device)
    begun = place.where(starts, 0).cummax(0).values
    past = torch.as_tensor(0 if cache is None else cache.tokens, device=valid.device).expand(valid.shape[0])
    before = past[valid.nonzero()[:, 0]].where(first[begun], 0)
    right = torch.equal(packed, place - begun + before)
    require(right, "position_ids", "other positions", "each token's place in its document, from 0, without padding")
    return starts


def _documents(name: str, offsets: Tensor, shape: torch.Size) -> Tensor:
    """[1, T]: the index of each column's document."""
    columns = shape[1]
    require(shape[0] == 1, name, f"a batch of {shape[0]} rows", "one row of packed documents")
    fits = is_integers(offsets) and offsets.ndim == 1 and len(offsets) > 1
    ends = fits and [int(offsets[0]), int(offsets[-1])] == [0, columns] and bool((offsets.diff() >= 0).all())
    got = offsets.tolist() if isinstance(offsets, Tensor) else type(offsets).__name__
    require(ends, name, got, f"integers from 0 to {columns}, where each document begins and the last ends")
    places = torch.arange(columns, device=offsets.device)
    return torch.searchsorted(offsets, places, right=True)[None]


def _require_integers(name: str, x: Tensor, shape: torch.Size) -> None:
    fits = is_integers(x) and list(x.shape) in ([*shape], [1, shape[1]], [shape[1]])
    require(fits, name, described(x), f"integers {list(shape)}")


def is_integers(x: Any) -> bool:
    """Whether it is a tensor of them."""
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def described(x: Any) -> str:
    """For errors."""
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _lengths(starts: Tensor) -> list[int]:
    """Of the documents."""
    return F.pad(starts.nonzero()[:, 0], (0, 1), value=len(starts)).diff().tolist()
