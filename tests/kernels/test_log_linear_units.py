"""Log-linear attention cut into units, all ranks in one process: what they would send, and what they make of it."""

import pytest
import torch

from lasp.kernels.fenwick import FenwickState
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.reference.log_linear import LogLinearOp
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from lasp.kernels.segments import Segments
from lasp.parallel.fenwick import Fenwick
from lasp.parallel.layout import Layout, Partition
from tests.kernels.log_linear import F64, draw
from tests.parallel.inputs import error

PACKED = (0, 3, 40, 41, 41, 110, 150)


class Rank:
    """One rank's share of a call, between the halves of the op."""

    def __init__(self, partition: Partition, tensors: dict, seen: list[int]):
        self.partition, self.op = partition, LogLinearOp()
        self.sides = [Fenwick.of(partition, seen, backward=back) for back in (False, True)]
        lengths = torch.tensor([0] + [len(fragment) for fragment in partition.local])
        tokens = [f.position + (seen[f.document] if f.document >= 0 else 0) for f in partition.local]
        local = {"decay": None, "beta": None} | {name: self.shard(x) for name, x in tensors.items()}
        segments = Segments(1, partition.local_tokens, lengths.cumsum(0))
        self.x = LogLinearInputs(**local, scale=0.4, segments=segments, seen=tuple(tokens))

    def shard(self, x):
        padded = torch.cat(
            [x, x.new_zeros(1, self.partition.layout.units * self.partition.unit_length, *x.shape[2:])], 1
        )
        return torch.cat([padded[:, a:b] for a, b in self.partition.ranges], 1)

    def sends(self, states, transition, documents, backward: bool):
        """[units of this rank, 1, slots, ...] and their transitions."""
        side, fragments = self.sides[backward], self.partition.local
        exits = self.partition.first if backward else self.partition.last
        own = torch.stack([states[i] for i in exits])[:, None]
        a = None if transition is None else torch.stack([transition[i] for i in exits])[:, None]
        for j, unit in enumerate(self.partition.owned):
            fragment = fragments[exits[j]]
            if documents is not None and fragment.document >= 0 and (fragment.ends if backward else fragment.begins):
                start = documents[fragment.document][None, None]
                width = max(own.shape[2], start.shape[2])
                own, start = (
                    torch.cat([y, y.new_zeros(*y.shape[:2], width - y.shape[2], *y.shape[3:])], 2) for y in (own, start)
                )
                own[j : j + 1] = side.extend(own[j : j + 1], None if a is None else a[j : j + 1], start, [unit])
        return side.pack(own, self.partition.owned), a

    def enters(self, units, documents, backward: bool):
        """[fragments, J, ...], given what enters each unit."""
        fragments = self.partition.local
        entries = self.partition.last if backward else self.partition.first
        width = max(units.shape[2], 0 if documents is None else documents.shape[1])
        states = units.new_zeros(len(fragments), width, *units.shape[3:])
        for i, f in enumerate(fragments):
            closed = f.ends if backward else f.begins
            if closed and documents is not None and f.document >= 0:
                states[i, : documents.shape[1]] = documents[f.document]
            elif not closed:
                states[i, : units.shape[2]] = units[entries.index(i), 0]
        return states


def exchange(ranks: list[Rank], sent: list, factors, backward: bool) -> list:
    """As the all-gather does it."""
    layout = ranks[0].partition.layout
    gathered = torch.cat(sent)
    by_unit = [gathered[place] for place in layout.rank_order]
    return [rank.sides[backward].combine(by_unit, factors, rank.partition.owned) for rank in ranks]


def split_call(layout: Layout, offsets, tensors, state, do, d_final):
    """o, final slots and the gradients of everything, as W ranks find them."""
    seen = [0] * (len(offsets) - 1) if state is None else state.tokens.tolist()
    ranks = [Rank(Partition(layout, r, list(offsets), aligned=True), tensors, seen) for r in range(layout.ranks)]
    slots = None if state is None else state.slots
    halves = [rank.op.summarize(rank.x, wanted=True) for rank in ranks]
    sent = [rank.sends(s.state, s.transition, slots, False) for rank, (s, _) in zip(ranks, halves, strict=True)]
    a = [transition for _, transition in sent]
    factors = None
    if a[0] is not None:
        gathered = torch.cat(a)
        factors = [Fenwick.factors_of(gathered, sent[0][0])[place] for place in layout.rank_order]
    entering = exchange(ranks, [message for message, _ in sent], factors, False)
    results = []
    for rank, (_, partial), units in zip(ranks, halves, entering, strict=True):
        incoming = rank.enters(units, slots, False)
        results.append(rank.op.finish(rank.x, partial, Pending(lambda incoming=incoming: incoming)))
    backs = [
        rank.op.summarize_grad(rank.x, kept, rank.shard(do), wanted=True)
        for rank, (*_, kept) in zip(ranks, results, strict=True)
    ]
    d_sent = [
        rank.sends(d, s.transition, d_final, True)[0] for rank, (d, _), (s, _) in zip(ranks, backs, halves, strict=True)
    ]
    leaving = exchange(ranks, d_sent, factors, True)
    found: dict = {"o": [], "final": torch.zeros_like(d_final)} | {f"d{name}": [] for name in tensors}
    if state is not None:
        found["dslots"] = torch.zeros_like(slots)
    for rank, (_, partial), units, (o, outgoing, _) in zip(ranks, backs, leaving, results, strict=True):
        d_outgoing = rank.enters(units, d_final, True)
        grads = rank.op.finish_grad(rank.x, (), partial, Pending(lambda d=d_outgoing: d))
        outgoing, d_incoming = outgoing.wait(), grads.incoming.wait()
        found["o"].append(o)
        for name in tensors:
            found[f"d{name}"].append(grads.of[name])
        for i, fragment in enumerate(rank.partition.local):
            if fragment.ends and fragment.document >= 0:
                final = outgoing[i]
                count = min(len(final), d_final.shape[1])
                found["final"][fragment.document, :count] = final[:count]
            if state is not None and fragment.begins and fragment.document >= 0:
                d_slots = d_incoming[i]
                count = min(len(d_slots), slots.shape[1])
                found["dslots"][fragment.document, :count] = d_slots[:count]
    length, partition = ranks[0].partition.unit_length, ranks[0].partition
    for name, parts in found.items():
        if isinstance(parts, list):
            units = torch.cat(parts, 1).unflatten(1, (layout.units, length))[:, layout.rank_order]
            found[name] = units.flatten(1, 2)[:, : partition.tokens]
    return found


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
def test_units_equal_the_whole(gen, layout, delta):
    cases = [
        (150, None, None),
        (150, PACKED, None),
        (3, None, None),
        (77, None, [13]),
        (150, PACKED, [5, 64, 0, 9, 40, 1]),
    ]
    for tokens, offsets, seen in cases:
        drawn = draw(gen, tokens, delta=delta, offsets=offsets, seen=seen, levels=9)
        leaves = {name: x.clone().requires_grad_() for name, x in drawn.tensors.items()}
        state = drawn.state
        if state is not None:
            leaves["slots"] = state.slots.clone().requires_grad_()
            state = FenwickState(leaves["slots"], state.tokens)
        named = {name: x for name, x in leaves.items() if name != "slots"}
        o, final = log_linear_recurrent(**named, scale=0.4, initial_state=state, cu_seqlens=drawn.cu_seqlens)
        do, d_final = (torch.randn(x.shape, generator=gen, dtype=F64) for x in (o, final.slots))
        grads = torch.autograd.grad([o, final.slots], list(leaves.values()), [do, d_final])
        wanted = {"o": o, "final": final.slots} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
        for ranks in (1, 2, 3, 4):
            got = split_call(Layout(layout, ranks), offsets or (0, tokens), drawn.tensors, drawn.state, do, d_final)
            found = {name: error(got[name], wanted[name].detach()) for name in wanted}
            assert max(found.values()) < 1e-10, (ranks, tokens, offsets, seen, found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_an_aligned_unit_sends_one_state_and_gets_one_gradient_for_each_bit_of_its_number(layout):
    partition = Partition(Layout(layout, 4), 0, [0, 1000], aligned=True)
    units = partition.layout.units
    forward, backward = (Fenwick.of(partition, [0], backward=back) for back in (False, True))
    real = range(1000 // partition.unit_length)
    assert [len(forward.sent(unit)) for unit in real] == [1] * len(real)
    assert [len(backward.sent(unit)) for unit in range(units)] == [unit.bit_count() for unit in range(units)]
