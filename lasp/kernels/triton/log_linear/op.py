"""Log-linear attention with a scalar gate: the halves of an op (lasp.kernels.recurrence)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp.kernels.fenwick import fitted
from lasp.kernels.layouts import laid_out
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.parked import index_tensor
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Kept
from lasp.kernels.segments import Tiles
from lasp.kernels.summary import Summary, apply
from lasp.kernels.triton.log_linear.config import LogLinearConfig, log_linear_config
from lasp.kernels.triton.log_linear.gates import gate_grads
from lasp.kernels.triton.log_linear.merging import NodeStates, fold, hand_down
from lasp.kernels.triton.log_linear.node_grads import node_grads
from lasp.kernels.triton.log_linear.reads import reads
from lasp.kernels.triton.log_linear.tree import tree_of
from lasp.kernels.triton.log_linear.writes import writes
from lasp.kernels.triton.scalar.config import scalar_config
from lasp.kernels.triton.scalar.gates import cumulate
from lasp.kernels.triton.scalar.tile_states import tile_states
from lasp.kernels.triton.shared.operands import contiguous, per_q_head


@dataclass(frozen=True)
class TritonLogLinear:
    """Backward finds the states of nodes again: kept are the initial slots alone."""

    config: LogLinearConfig | None = None  # None takes it from the table

    def summarize(self, x: LogLinearInputs, wanted: bool):
        call = Call(x, self.config)
        return Summary(call.own_slots(), call.transition) if wanted else None, call

    def finish(
        self, x: LogLinearInputs, partial: "Call", incoming: Pending[Tensor | None]
    ) -> tuple[Tensor, Pending, Kept]:
        call, slots = partial, incoming.wait()
        slots = None if slots is None else call.initial(slots)
        x = call.x
        o, _ = call.reads(slots, x.q, x.k, x.v)
        return o, Pending(lambda: call.outgoing(slots)), (slots,)

    def summarize_grad(self, x: LogLinearInputs, kept: Kept, do: Tensor, wanted: bool):
        call, do = Call(x, self.config), laid_out(do)
        parts, totals = call.node_grads(do)
        return call.d_incoming(parts, totals) if wanted else None, (call, do, parts, totals, kept[0])

    def finish_grad(self, x: LogLinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        call, do, parts, totals, slots = partial
        x, tree = call.x, call.tree
        dq, shares = call.reads(slots, do, x.v, x.k, partner=x.q)
        assert shares is not None
        final = d_outgoing.wait()
        final = None if final is None else fitted(final, x.tokens_after, tree.slots).contiguous()
        of_heights = shares.of_heights.sum((0, 2))
        ends = None if final is None else call.through_ends(slots, final, of_heights)
        beyond_heights = of_heights.flip(1).cumsum(1).flip(1)[:, 1:].contiguous()
        grads, across = hand_down(tree, call.states, parts, totals, final, beyond_heights)
        if ends is not None:
            across[0, tree.last] += ends
        both = tree, grads, final
        dv, within, beyond = writes(*both, x.k, x.q, do, *call.shared, partner=x.v)
        dk, _, _ = writes(*both, x.v, do, x.q, *call.shared, transposed=True)
        assert x.decay is not None and within is not None and beyond is not None
        of = {
            "q": per_q_head(dq, x.q),
            "k": per_q_head(dk, x.q),
            "v": dv,
            "decay": gate_grads(tree, x.decay, shares.through, within, beyond, across),
            "level_scales": shares.d_scales.sum(0).to(x.level_scales.dtype),
        }
        return Gradients(of, Pending(lambda: call.d_incoming(parts, totals, final)))


class Call:
    """What both directions begin with: the tree, gates and the states of its nodes."""

    def __init__(self, x: LogLinearInputs, config: LogLinearConfig | None):
        self.x = x = contiguous(x)
        assert x.decay is not None
        self.config = config = config or log_linear_config(x.k, x.v)
        self.tree = tree_of(x, config.leaf, config.piece)
        gates = cumulate(self.tree.tiles, x.decay, x.v, config.leaf)
        assert gates is not None
        states, decays = self._states_of(self.tree.tiles)
        dtype = x.v.dtype if x.v.dtype == torch.bfloat16 else torch.float32
        self.states = NodeStates(self.tree, states, decays, dtype)
        self.gates, self.leaf_decays = gates, decays
        self.shared = gates, x.level_scales, x.scale, config

    def _states_of(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """[tiles, H, K, V] and their log decays [tiles, H], in fp32."""
        x = self.x
        steps = replace(scalar_config(x.k, x.v, True), chunk=self.config.chunk)
        gates = cumulate(tiles, x.decay, x.v, steps.chunk)
        states, decays, _ = tile_states(tiles, x.k, x.v, gates, steps)
        assert decays is not None
        return states, decays

    def reads(self, slots: Tensor | None, a: Tensor, b: Tensor, c: Tensor, partner: Tensor | None = None):
        slots = None if slots is None else slots.to(self.states.seen.dtype)
        return reads(self.tree, self.states, slots, a, b, c, *self.shared, partner)

    def node_grads(self, do: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x
        return node_grads(self.tree, x.q, do, self.gates, x.level_scales, self.leaf_decays, x.scale, self.config)

    def initial(self, slots: Tensor) -> Tensor | None:
        """[I, H, K, V]: those of [N, J, H, K, V] that hold tokens; None if there are none."""
        segment, slot, _ = self.tree.initial
        return slots[segment, slot].contiguous() if len(segment) else None

    @property
    def transition(self) -> Tensor:
        """The segments' log decays, [N, 1, H]."""
        return self.states.decays[self.tree.roots][:, None]

    def own_slots(self) -> Tensor:
        """The final slots [N, J, H, K, V] if nothing comes in."""
        x, tree = self.x, self.tree
        result = x.v.new_zeros(x.state_shape, dtype=torch.float32)
        segment, slot, node, _ = tree.final
        result[segment, slot] = self.states.of(node) * self._until_end()[..., None, None].exp()
        if (tail := self._tail()) is not None:
            tiles, segment, slot, later = tail
            states, decays = self._states_of(tiles)
            passed = torch.stack([decays[i + 1 : i + 1 + n].sum(0) for i, n in enumerate(later)])
            result[segment, slot] = states * passed[..., None, None].exp()
        return result

    def _until_end(self) -> Tensor:
        """[F, H]: the log decay from the end of every final slot that is a node to the end of its segment."""
        segment, _, _, pair = self.tree.final
        return self.tree.nearer @ self.states.spans[pair] + self.leaf_decays[self.tree.last[segment]]

    def _tail(self) -> tuple[Tiles, Tensor, Tensor, list[int]] | None:
        """The final slots in the last leaves: their tokens as tiles, segments and slots, and how many slots of the same
        segment lie behind each."""
        x, leaf = self.x, self.config.leaf
        found: list[tuple[int, int, int, int, int]] = []
        ends = zip(x.segments.offsets.tolist()[1:], x.tokens.tolist(), x.tokens_after.tolist(), strict=True)
        for n, (stop, before, after) in enumerate(ends):
            held = [j for j in range(leaf.bit_length() - 1) if after >> j & 1]
            for j in reversed(held):
                start = max(after >> j + 1 << j + 1, before)
                end = (after >> j + 1 << j + 1) + (1 << j)
                if start < end:
                    found.append((stop - after + start, end - start, n, j, len([i for i in held if i < j])))
        if not found:
            return None
        start, length, segment, slot, later = (list(column) for column in zip(*found, strict=True))
        device = x.v.device
        tiles = Tiles(
            leaf,
            len(found),
            index_tensor(start, device),
            index_tensor(length, device, torch.int32),
            index_tensor(segment, device, torch.int32),
            torch.arange(len(found) + 1, device=device, dtype=torch.int32),
        )
        return tiles, index_tensor(segment, device), index_tensor(slot, device), later

    def _left(self, states: Tensor) -> Tensor:
        """Of states [I, H, K, V] of the initial slots, what is left of them behind the segments."""
        return apply(self.transition[self.tree.initial[0], 0], states)

    def outgoing(self, slots: Tensor | None) -> Tensor:
        """The final slots [N, J, H, K, V], given the initial ones [I, H, K, V]."""
        own = self.own_slots()
        if slots is not None:
            segment, _, to = self.tree.initial
            own.index_put_((segment, to), self._left(slots), accumulate=True)
        return own

    def d_incoming(self, parts: Tensor, totals: Tensor, final: Tensor | None = None) -> Tensor:
        """The gradients of the initial slots [N, J, H, K, V], through the queries and through the final slots."""
        tree = self.tree
        d = parts.new_zeros(self.x.state_shape)
        segment, slot, to = tree.initial
        d[segment, slot] = fold(tree, parts, totals)
        if final is not None:
            d[segment, slot] += self._left(final[segment, to])
        return d

    def through_ends(self, slots: Tensor | None, final: Tensor, of_heights: Tensor) -> Tensor:
        """[N, H]: what final slots get from before the last leaf, through all gates of that. It is added to
        `of_heights` [M, heights + 1, H], as if a query at the end had read it."""
        tree, low = self.tree, self.tree.leaf.bit_length() - 1
        segment, slot, node, _ = tree.final
        own = self.states.of(node) * self._until_end()[..., None, None].exp()
        share = (own * final[segment, slot]).sum((-1, -2))
        of_heights[tree.last[segment], slot - low] += share
        ends = final.new_zeros(final.shape[0], final.shape[2])
        ends.index_put_((segment,), share, accumulate=True)
        if slots is not None:
            segment, _, to = tree.initial
            share = (self._left(slots) * final[segment, to]).sum((-1, -2))
            of_initial = torch.zeros_like(ends).index_put_((segment,), share, accumulate=True)
            of_heights[tree.last, -1] += of_initial
            ends += of_initial
        return ends
