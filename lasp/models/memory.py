"""What a model remembers of the tokens before the ones at hand: for generation and for long sequences in segments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import causal_conv1d, delta_rule, linear_attention, softmax_attention
from lasp.models.sequence import SequenceOps, ShardedSequence


class Memory:
    """Per layer, the outgoing state of each of its ops, in the order in which the layer calls them.

    slots: slots[layer][i] is the i-th op's: the state [B, H, K, V] of linear attention or the delta rule, the last
    inputs [B, width - 1, D] of a convolution, or the keys and values [B, tokens, Hkv, K] of softmax attention.
    tokens: how many tokens have been seen.

    It starts empty, with any batch size; the rows of a batch are sequences of one length. Gradients flow through it.
    """

    def __init__(self) -> None:
        self.slots: dict[int, list[Any]] = {}
        self.tokens = 0
        self._accepted: ShardedSequence | None = None

    def attach(self, seq: ShardedSequence, layer: int) -> "RememberingOps":
        """`seq` for one layer's next call: its ops start from this memory's states and leave theirs in it.

        Raises ValueError unless `seq` is one rank's, without padding or packed documents.
        """
        if seq is not self._accepted:
            _require_whole(seq)
            self._accepted = seq
        return RememberingOps(seq, self.slots.setdefault(layer, []), self.tokens)

    def advance(self, tokens: int) -> None:
        """All layers have seen that many tokens more."""
        self.tokens += tokens


def _require_whole(seq: ShardedSequence) -> None:
    every = torch.arange(seq.positions.shape[0], device=seq.positions.device)
    try:
        whole = torch.equal(seq.shard(every, dim=0), seq.positions)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("seq: got part of a sequence, padding or packed documents, expected one rank's whole sequence")


class RememberingOps:
    """The ops of a `seq` of one rank, with a past. Good for one call of one layer."""

    def __init__(self, seq: SequenceOps, slots: list[Any], tokens: int):
        self.positions, self.valid = seq.positions + tokens, seq.valid
        self._slots, self._next = slots, 0

    def sum(self, x: Tensor) -> Tensor:
        return x

    def _step(self, op: Callable[[Any], tuple[Tensor, Any]]) -> Tensor:
        """Runs op(past) -> (output, past for the next call) on the layer's next slot; the first past is None."""
        if self._next == len(self._slots):
            self._slots.append(None)
        output, self._slots[self._next] = op(self._slots[self._next])
        self._next += 1
        return output

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        def op(state):
            return linear_attention(q, k, v, decay, scale=scale, initial_state=state, output_final_state=True)

        return self._step(op), None

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, None]:
        def op(state):
            return delta_rule(q, k, v, beta, decay, scale=scale, initial_state=state, output_final_state=True)

        return self._step(op), None

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        def op(past):
            keys, values = k, v
            if past is not None:
                keys, values = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
            return softmax_attention(q, keys, values, scale=scale)[0], (keys, values)

        return self._step(op)

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def op(tail):
            if tail is None:
                tail = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
            rows = torch.cat([tail, x], dim=1)
            last = rows[:, x.shape[1] :].clone()  # a view would keep all of rows
            return causal_conv1d(x, weight, bias, initial_tail=tail), last

        return self._step(op)
