"""Log-linear attention with the delta rule: the halves of an op (lasp.kernels.recurrence)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.fenwick import fitted, moved, moved_back, routes_on
from lasp.kernels.layouts import laid_out
from lasp.kernels.log_linear_inputs import LogLinearDeltaInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Kept
from lasp.kernels.summary import Summary
from lasp.kernels.triton.delta.ut_transform import chunk_scores, ut_transform
from lasp.kernels.triton.log_linear.merging import fold
from lasp.kernels.triton.log_linear.tree import tree_of
from lasp.kernels.triton.log_linear_delta.finals import Finals, finals_of
from lasp.kernels.triton.log_linear_delta.gradients import gradients
from lasp.kernels.triton.log_linear_delta.merging import hand_down, merge
from lasp.kernels.triton.log_linear_delta.node_grads import node_grads
from lasp.kernels.triton.log_linear_delta.query_grads import query_grads
from lasp.kernels.triton.log_linear_delta.reads import outputs
from lasp.kernels.triton.log_linear_delta.terms import leaf_terms
from lasp.kernels.triton.shared.operands import contiguous, per_q_head
from lasp.kernels.triton.shared.tiles import CHUNK

PIECE = 16  # leaves whose queries one program sums up
AT_ONCE = 2**18  # tokens x heads: backward takes some 20 KiB for each, with heads of 128
KEPT = 2**21  # of which what was made for a summary is not made again


class Part(NamedTuple):
    """Some heads of a call."""

    heads: slice
    x: LogLinearDeltaInputs

    def of(self, x: Tensor | None) -> Tensor | None:
        """Of slots [N, J, H, K, V], or of [B, T, H, ...]."""
        return None if x is None else x[:, :, self.heads]


def parts_of(x: LogLinearDeltaInputs) -> Iterator[Part]:
    batch, tokens, heads, _ = x.v.shape
    group, some = heads // x.q.shape[2], max(1, min(heads, AT_ONCE // (batch * tokens)))
    while some % group and group % some:
        some -= 1
    for first in range(0, heads, some):
        part = slice(first, first + some)
        of_q = slice(first // group, (first + some - 1) // group + 1)
        tensors = {name: t[:, :, of_q if name in "qk" else part] for name, t in x.tensors.items()}
        yield Part(part, x.having(tensors))


@dataclass(frozen=True)
class TritonLogLinearDelta:
    """Heads come in parts, one after the other, since nodes take many times the memory of their tokens; where a summary
    is wanted, and these are few, all parts stay until the other half. Kept are the initial slots alone."""

    def summarize(self, x: LogLinearDeltaInputs, wanted: bool):
        if not wanted:
            return None, None
        calls = _all(x, (Call(part.x) for part in parts_of(x)))
        slots, transitions = zip(*((call.own_slots(), call.transition) for call in calls), strict=True)
        return Summary(torch.cat(slots, 2), torch.cat(transitions, 2)), _if_kept(calls)

    def finish(
        self, x: LogLinearDeltaInputs, partial, incoming: Pending[Tensor | None]
    ) -> tuple[Tensor, Pending, Kept]:
        slots = incoming.wait()

        def of_parts(wanted: Callable[["Call", Tensor | None], Tensor]) -> Tensor:
            calls = partial or (Call(part.x) for part in parts_of(x))
            return torch.cat([wanted(call, part.of(slots)) for part, call in zip(parts_of(x), calls, strict=True)], 2)

        return of_parts(Call.outputs), Pending(lambda: of_parts(Call.outgoing)), (slots,)

    def summarize_grad(self, x: LogLinearDeltaInputs, kept: Kept, do: Tensor, wanted: bool):
        do, (slots,) = laid_out(do), kept
        if not wanted:
            return None, (do, slots, None)
        made = _all(x, (Backward(part, do, slots) for part in parts_of(x)))
        return torch.cat([each.d_incoming() for each in made], 2), (do, slots, _if_kept(made))

    def finish_grad(
        self, x: LogLinearDeltaInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]
    ) -> Gradients:
        do, slots, made = partial
        final, found, d_incoming = d_outgoing.wait(), [], []
        for each in made or (Backward(part, do, slots) for part in parts_of(x)):
            found.append(each.gradients(final))
            d_incoming.append(each.d_incoming())
        of: dict[str, Tensor | None] = {}
        for name in x.tensors:
            of[name] = whole = torch.cat([each.pop(name) for each in found], 2)
            if name in "qk":
                of[name] = per_q_head(whole, x.q)
        return Gradients(of, Pending(lambda: torch.cat(d_incoming, 2)))


Made = TypeVar("Made")


def _all(x: LogLinearDeltaInputs, parts: Iterator[Made]) -> Iterable[Made]:
    """All parts at once if they are few, else one after the other."""
    return list(parts) if x.v.shape[:3].numel() <= KEPT else parts


def _if_kept(parts: Iterable[Made]) -> list[Made] | None:
    return parts if isinstance(parts, list) else None


class Call:
    """What both directions begin with: the terms of leaves, and the states and transitions of nodes."""

    def __init__(self, x: LogLinearDeltaInputs):
        self.x = x = contiguous(x if x.decay is not None else x.having({"decay": torch.zeros_like(x.beta)}))
        assert x.decay is not None
        work = x.v.dtype if x.v.dtype == torch.bfloat16 else torch.float32
        self.precision = "tf32" if work == torch.bfloat16 else "tf32x3"
        self.tree = tree = tree_of(x, CHUNK, PIECE)
        self.ut, self.gates, _ = ut_transform(tree.tiles, x.k, x.decay, x.beta, None, work)
        self.scores = chunk_scores(
            tree.tiles, x.q, x.k, self.gates, Decay.SCALAR.value, self.ut, x.scale, self.precision
        )
        nodes, (heads, key_dim, value_dim) = tree.tiles.count + tree.pairs, x.state_shape[2:]
        self.states = x.v.new_empty(nodes, heads, key_dim, value_dim, dtype=torch.float32)
        self.transitions = self.states.new_empty(nodes, heads, key_dim, key_dim)
        terms = x.q, x.k, x.v, self.ut, self.scores, self.gates, self.states, self.transitions
        self.rows, self.reads = leaf_terms(tree.tiles, *terms, x.scale, self.precision)
        merge(tree, self.states, self.transitions, self.precision)

    def seen(self, slots: Tensor | None) -> Tensor | None:
        """[I, H, K, V]: those of the initial slots [N, J, H, K, V] that hold tokens; None if there are none."""
        segment, slot, _ = self.tree.initial
        return slots[segment, slot].contiguous() if slots is not None and len(segment) else None

    def outputs(self, slots: Tensor | None) -> Tensor:
        terms = self.rows, self.reads, self.x.level_scales, self.states, self.transitions
        return outputs(self.tree, self.x.v, *terms, self.seen(slots), self.precision)

    @property
    def transition(self) -> Tensor:
        """The segments' [N, 1, H, K, K]."""
        return self.transitions[self.tree.roots][:, None]

    def own_slots(self) -> Tensor:
        """The final slots [N, J, H, K, V] if nothing comes in."""
        finals = finals_of(self.x)
        nodes = finals.nodes(self.states), finals.nodes(self.transitions)
        return finals.slots(finals.tokens(self.x), *nodes, self.x.state_shape[1])

    def route(self) -> Tensor:
        x = self.x
        return routes_on(x.seen, tuple(x.tokens_after.tolist()), x.state_shape[1], torch.float32, x.v.device)

    def entered(self, slots: Tensor) -> Tensor:
        """The initial slots as parts of the final ones, [N, J, H, K, V]."""
        return moved(fitted(slots, self.x.tokens, self.x.state_shape[1]), self.route())

    def outgoing(self, slots: Tensor | None) -> Tensor:
        own = self.own_slots()
        return own if slots is None else own + self.transition @ self.entered(slots)


class Backward:
    """That of some heads, up to what nodes and initial slots get from queries."""

    def __init__(self, part: Part, do: Tensor, slots: Tensor | None):
        self.call = call = Call(part.x)
        do, self.part, self.slots = part.of(do).contiguous(), part, part.of(slots)  # type: ignore[union-attr]
        tree, x = call.tree, call.x
        terms = call.rows, call.reads, x.level_scales, call.states, call.transitions
        self.queries, kept = query_grads(tree, x.v, do, *terms, call.seen(self.slots), call.precision)
        self.parts, self.transition_parts = node_grads(tree, do, x.level_scales, kept, call.precision)
        no_decay = self.parts.new_zeros(self.parts.shape[:2])  # pieces' transitions are in their rows
        self.d_slots = self.parts.new_zeros(x.state_shape)
        segment, slot, _ = tree.initial
        self.d_slots[segment, slot] = fold(tree, self.parts, no_decay)

    def d_incoming(self) -> Tensor:
        """The gradients of the initial slots: through the queries, and once `gradients` has run, through the final
        slots, too."""
        return self.d_slots

    def gradients(self, final: Tensor | None) -> dict[str, Tensor]:
        """Of all inputs; dq and dk for every value head. final: the gradients of the final slots, of all heads."""
        call, final = self.call, self.part.of(final)
        x, tree = call.x, call.tree
        assert x.decay is not None
        d_states, d_transitions = (torch.empty_like(t) for t in (call.states, call.transitions))
        for grads in (d_states, d_transitions):
            grads.index_fill_(0, tree.roots, 0.0)
        of_last: dict[str, Tensor] = {}
        if final is not None:
            final = fitted(final, x.tokens_after, tree.slots)
            of_last = self._through_nodes(finals_of(x), final)
            if self.slots is not None:
                d_transitions[tree.roots] = (final @ call.entered(self.slots).mT).sum(1)
            self.d_slots = self.d_slots + moved_back(call.transition.mT @ final, call.route())
        nodes = call.states, call.transitions, self.parts, self.transition_parts, d_states, d_transitions
        hand_down(tree, *nodes, call.precision)
        given = x.q, x.k, x.v, x.decay, x.beta, call.ut, call.scores, call.gates
        found = gradients(tree, *given, self.queries, d_states, d_transitions, x.scale, call.precision)
        of = dict(zip(("q", "k", "v", "beta", "decay"), found, strict=True))
        of |= {name: finals_of(x).add_tokens(of[name], grad) for name, grad in of_last.items()}
        return of | {"level_scales": self.queries.d_scales.to(x.level_scales.dtype)}

    def _through_nodes(self, finals: Finals, final: Tensor) -> dict[str, Tensor]:
        """What the last leaves' tokens get of the final slots' gradients; the nodes' is added to that from queries."""
        call = self.call
        leaves = {name: t.requires_grad_() for name, t in finals.tokens(call.x).items()}
        heads = call.x.v.shape[2]
        leaves["k"] = leaves["k"].detach().repeat_interleave(heads // leaves["k"].shape[1], dim=1).requires_grad_()
        states, transitions = (
            [node.requires_grad_() for node in finals.nodes(t)] for t in (call.states, call.transitions)
        )
        with torch.enable_grad():
            slots = finals.slots(leaves, states, transitions, final.shape[1])
        inputs = [*leaves.values(), *states, *transitions]
        grads = torch.autograd.grad(slots, inputs, final, materialize_grads=True)
        of_nodes = iter(grads[len(leaves) :])
        for parts in (self.parts, self.transition_parts):
            for sight in finals.sights:
                parts[call.tree.first_pieces[sight.pair]] += next(of_nodes)
        return dict(zip(leaves, grads, strict=False)) if finals.has_tokens else {}
