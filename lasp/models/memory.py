"""What a model remembers of the tokens before the ones at hand, on one rank: for generation."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lasp import kernels
from lasp.kernels import causal_conv1d, short_conv, softmax_attention
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.log_linear_step import FenwickMemory, go_on
from lasp.kernels.parts import Parts
from lasp.models.past import OpsWithPast, Past, Slots
from lasp.models.sequence import SequenceOps, ShardedSequence


class Rows:
    """Rows of unequal length, one behind the other in a batch of one, [1, sum of lengths, ...]: a `seq` for a memory.

    lengths: each row's; 0 where a row gets no token this time. offsets: [B + 1] int64 on the host, where they begin.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.offsets = torch.tensor([0, *accumulate(lengths)], device="cpu")
        self.positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.valid = torch.ones_like(self.positions, dtype=torch.bool)


class Memory(Past):
    """The past of whole sequences.

    slots: of linear attention or the delta rule the state [B, H, K, V], of the log-linear ones a `FenwickState` or
    `FenwickMemory`, of a convolution the last inputs [B, width - 1, D], and of softmax attention a list of pairs, keys
    and values [B, tokens, Hkv, K]: one pair of all rows, or one of each row once their lengths differ; with a window,
    only what those to come can see.
    tokens: how many tokens have been seen; [B] int64 once rows have come as `Rows`.

    It starts empty, with any batch size. Gradients flow through it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: int | Tensor = 0
        self._accepted: ShardedSequence | None = None

    def attacher(self, index: int) -> Callable[[ShardedSequence | Rows, Slots], "RememberingOps"]:
        """As in `Past`, for the tokens seen so far; it raises ValueError unless `seq` is one rank's, without padding or
        packed documents, or `Rows`."""
        tokens = self.tokens

        def attach(seq: ShardedSequence | Rows, slots: Slots) -> RememberingOps:
            if not isinstance(seq, Rows) and seq is not self._accepted:
                _require_whole(seq)
                self._accepted = seq
            return RememberingOps(seq, slots, tokens)

        return attach

    def advance(self, seq: SequenceOps | Rows) -> None:
        if isinstance(seq, Rows):
            self.tokens = self.tokens + torch.tensor(seq.lengths, device=seq.positions.device)
        else:
            self.tokens = self.tokens + seq.positions.shape[0]

    def select(self, rows: Tensor) -> None:
        """Row i goes on from what was row rows[i]; rows may be repeated or left out."""

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, rows.to(x.device))

        def select(slot: Any) -> Any:
            if isinstance(slot, Tensor):
                return chosen(slot)
            if isinstance(slot, FenwickState | FenwickMemory):
                return slot.select(rows)
            if len(slot) > 1:
                return [slot[row] for row in rows.tolist()]
            return [tuple(chosen(x) for x in pair) for pair in slot]

        self.slots = {layer: [select(slot) for slot in slots] for layer, slots in self.slots.items()}
        if isinstance(self.tokens, Tensor):
            self.tokens = chosen(self.tokens)


def _require_whole(seq: ShardedSequence) -> None:
    every = torch.arange(seq.positions.shape[0], device=seq.positions.device)
    try:
        whole = torch.equal(seq.shard(every, dim=0), seq.positions)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("seq: got part of a sequence, padding or packed documents, expected one rank's whole sequence")


class RememberingOps(OpsWithPast):
    """The ops of a `seq` of one rank, with a past. Good for one call of one layer.

    positions: [T], or [B, T] where rows of a batch have pasts of unequal length.
    """

    def __init__(self, seq: SequenceOps | Rows, slots: Slots, tokens: int | Tensor):
        super().__init__(slots, kernels)
        self._rows = seq if isinstance(seq, Rows) else None
        self._offsets = None if self._rows is None else self._rows.offsets
        self._unequal = self._rows is not None or isinstance(tokens, Tensor)
        self.positions, self.valid = seq.positions + self._before(tokens), seq.valid

    def _before(self, tokens: int | Tensor) -> int | Tensor:
        """How many tokens precede each of those at hand, in a shape to add to their positions."""
        if not isinstance(tokens, Tensor):
            return tokens
        if self._rows is None:
            return tokens[:, None]
        return torch.cat([past.expand(n) for past, n in zip(tokens, self._rows.lengths, strict=True)])

    def sum(self, x: Tensor) -> Tensor:
        return x

    def _continuing(self, state: Tensor | None) -> dict[str, Any]:
        return {"initial_state": state, "output_final_state": True, "cu_seqlens": self._offsets}

    def _go_on(self, past: Any, tensors: Mapping[str, Tensor | None], scale: float | None) -> tuple[Tensor, Any]:
        return go_on(past, **tensors, scale=scale, cu_seqlens=self._offsets)

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        def op(past):
            new = list(zip(self._apart(k), self._apart(v), strict=True))
            if past is not None and len(past) < len(new):  # of all rows so far: their lengths were equal
                past = list(zip(*(x.split(1) for x in past[0]), strict=True))
            if past is not None:
                new = [
                    (torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1))
                    for (old_k, old_v), (k, v) in zip(past, new, strict=True)
                ]
            rows = zip(self._apart(q), new, strict=True)
            o = self._together([_attend(row, keys, values, scale, window) for row, (keys, values) in rows])
            return o, new if window is None else [tuple(_newest(x, window - 1) for x in pair) for pair in new]

        return self._step(op)

    def _apart(self, x: Tensor) -> list[Tensor]:
        """Row by row, if their lengths differ."""
        if self._rows is not None:
            return list(x.split(self._rows.lengths, dim=1))
        return list(x.split(1)) if self._unequal else [x]

    def _together(self, rows: list[Tensor]) -> Tensor:
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=0 if self._rows is None else 1)

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._convolve(partial(causal_conv1d, x, weight, bias), x, weight)

    def short_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, ...]:
        return self._convolve(partial(short_conv, x, weight, bias, parts), x, weight)

    def _convolve(self, convolution: Callable[..., Any], x: Tensor, weight: Tensor) -> Any:
        def op(tail):
            if tail is None:
                rows = x.shape[0] if self._rows is None else len(self._rows.lengths)
                tail = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
            y = convolution(initial_tail=tail, cu_seqlens=self._offsets)
            return y, self._last(tail, x)

        return self._step(op)

    def _last(self, tail: Tensor, x: Tensor) -> Tensor:
        """The last rows of each [tail, x], as many as tail has; a copy, since a view would keep all of x."""
        if self._rows is None:
            return torch.cat([tail, x], dim=1)[:, x.shape[1] :].clone()
        return torch.stack(
            [torch.cat([old, new])[len(new) :] for old, new in zip(tail, x[0].split(self._rows.lengths), strict=True)]
        )


def _newest(x: Tensor, tokens: int) -> Tensor:
    """The last tokens of x [B, tokens, ...]; a copy if others are left out, since a view would keep all of x."""
    before = max(0, x.shape[1] - tokens)
    return x[:, before:].clone() if before else x


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """What the last tokens of a row see, of which there may be none."""
    if q.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    return softmax_attention(q, k, v, scale=scale, window=window)[0]
