"""Log-linear attention over the ranks of a sequence (math §4): what lies between the two halves of its op.

As for states that are affine maps (`AcrossUnits`), one summary leaves a unit, that of its last fragment, and one thing
enters it, for its first. But they are slots, and where these go depends on the positions of the fragments.
"""

from collections.abc import Callable
from collections.abc import Sequence as Numbers
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.fenwick import FenwickState, resized
from lasp.kernels.log_linear import check_levels, check_state, run_op, seen_by
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept, Op
from lasp.kernels.summary import Summary, Transition
from lasp.parallel import comm
from lasp.parallel.agreement import Agreed, gradients, signature
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.fenwick import Fenwick, Slots, position
from lasp.parallel.layout import PADDING, Partition
from lasp.parallel.spread import spread

if TYPE_CHECKING:
    from lasp.parallel.sequence import Sequence


def attend(
    sequence: "Sequence",
    method: str,
    inputs: Callable[[], LogLinearInputs],
    initial_state: FenwickState | None,
    output_final_state: bool,
) -> tuple[Tensor, FenwickState | None]:
    """The op of a `Sequence`'s method; its inputs are this rank's tokens."""
    made: list[LogLinearInputs] = []

    def check() -> dict:
        made.append(x := inputs())
        sequence._check_tokens(x.v)
        sequence._require_past("initial_state", initial_state)
        check_state(initial_state, sequence._states(x.segments.batch), x)
        _check_units(sequence)
        seen = _seen(sequence, initial_state)
        check_levels(x.level_scales.shape[-1], torch.tensor(_totals(sequence.partition, seen), device="cpu"))
        slots = None if initial_state is None else initial_state.slots
        asked = gradients(*x.tensors.values(), slots) | gradients(slots, of="initial_state")
        options = x.options | {"output_final_state": bool(output_final_state), "seen": seen}
        return signature(**x.tensors, slots=slots) | asked | options

    agreed = sequence._agree(method, check)
    (x,) = made
    return _exchanged(sequence, agreed, x, initial_state, output_final_state)


def _exchanged(
    sequence: "Sequence",
    agreed: Agreed,
    x: LogLinearInputs,
    initial_state: FenwickState | None,
    output_final_state: bool,
) -> tuple[Tensor, FenwickState | None]:
    partition, batch, seen = sequence.partition, x.segments.batch, _seen(sequence, initial_state)
    local, totals = sequence._local(batch), _totals(partition, seen)
    before = tuple(position(partition, seen, fragment) for fragment in partition.local) * batch
    x = x.cut({name: local.fold(tensor) for name, tensor in x.tensors.items()}, local.segments, before)
    entered, left = sequence._documents_with_states()
    boundary = sequence._alone() or AcrossSlots(partition, batch, sequence.parallel.group, seen, entered, left)
    slots = None if initial_state is None else resized(initial_state.slots, max(totals).bit_length())
    o, final = run_op(x, "auto", boundary, slots, output_final_state, around=Between)
    tokens = torch.tensor([totals[document] for document in left] * batch, device="cpu")
    o = local.unfold(agreed.in_backward(o, "final_state"))
    return o, None if final is None else FenwickState(final, tokens)


def _seen(sequence: "Sequence", state: FenwickState | None) -> tuple[int, ...]:
    """How many tokens every document has had before this sequence."""
    partition, seen = sequence.partition, [0] * sequence.partition.documents
    entered, _ = sequence._documents_with_states()
    if state is not None and len(entered):
        rows = torch.tensor(seen_by(state, 0), device="cpu").view(-1, len(entered))
        same = bool((rows == rows[:1]).all())
        got = state.tokens.tolist()
        checks.require(same, "initial_state.tokens", got, "the same number for all rows of a batch")
        for document, tokens in zip(entered, rows[0].tolist(), strict=True):
            seen[document] = tokens
    past = partition.past
    checks.require(past in (0, seen[0]), "initial_state.tokens", seen[0], f"{past}, which came before")
    return tuple(seen)


def _check_units(sequence: "Sequence") -> None:
    partition, exchange = sequence.partition, sequence.parallel.exchange
    checks.require(partition.unit_by_unit, "sequence", "documents that are cut one by one", "a packed stream")
    if partition.layout.units > 1:
        length, expected = partition.unit_length, "a power of two: sequence(..., aligned=True)"
        checks.require(length & (length - 1) == 0, "sequence", f"units of {length} tokens", expected)
        got = f"{type(exchange).__name__}, which sends affine states alone"
        checks.require(isinstance(exchange, AllGather | Auto), "state_exchange", got, "'auto' or 'all_gather'")


def _totals(partition: Partition, seen: tuple[int, ...]) -> list[int]:
    """How many tokens every document has had in the end."""
    return [had + stop - start for had, (start, stop) in zip(seen, pairwise(partition.offsets), strict=True)]


class Arriving(NamedTuple):
    """slots: [N, J, H, K, V], the gradients of what left the fragments. gates: what other ranks add to the gradients of
    units' log decays, [units of this rank, B, H]; to be waited for once the slots have been used."""

    slots: Tensor
    gates: Pending[Tensor]


@dataclass(frozen=True)
class Between:
    """An op whose tokens are the units of a rank. A scalar gate also decays states that pass its unit by, from one rank
    to another: what these say of its gradient is added here to what the op finds itself."""

    op: Op[Any]

    def summarize(self, x: LogLinearInputs, wanted: bool) -> tuple[Summary | None, Any]:
        return self.op.summarize(x, wanted)

    def finish(self, x: LogLinearInputs, partial: Any, incoming: Pending[Tensor | None]) -> Finished:
        return self.op.finish(x, partial, incoming)

    def summarize_grad(self, x: LogLinearInputs, kept: Kept, do: Tensor, wanted: bool) -> tuple[Tensor | None, Any]:
        return self.op.summarize_grad(x, kept, do, wanted)

    def finish_grad(self, x: LogLinearInputs, kept: Kept, partial: Any, d_outgoing: Pending[Any]) -> Gradients:
        gates: list[Pending[Tensor]] = []

        def arrive(found: Arriving | Tensor | None) -> Tensor | None:
            if not isinstance(found, Arriving):
                return found
            gates.append(found.gates)
            return found.slots

        grads = self.op.finish_grad(x, kept, partial, d_outgoing.then(arrive))
        for pending in gates:
            of_units, decay = pending.wait(), grads.of["decay"]
            assert decay is not None
            units, batch, heads = of_units.shape
            by_unit = decay.reshape(batch, units, -1, heads) + of_units.transpose(0, 1)[:, :, None]
            grads.of["decay"] = by_unit.reshape(decay.shape).to(decay.dtype)
        return grads


class AcrossSlots:
    """A `Boundary` (see lasp.kernels.recurrence) for slots, whose segments are the fragments of one rank.

    seen: what every document has had before this sequence. entered, left: the documents of which there are initial and
    final states; the others begin with nothing, and leave nothing.
    """

    wants_summary = True

    def __init__(
        self, partition: Partition, batch: int, group: Group, seen: tuple[int, ...],
        entered: Numbers[int], left: Numbers[int],
    ):  # fmt: skip
        self.partition, self.group, self.batch = partition, group, batch
        self.entered, self.left = entered, left
        self.forward, self.backward = (Fenwick.of(partition, seen, backward=back) for back in (False, True))
        self.slots = max(_totals(partition, seen)).bit_length()

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor, Kept]]:
        """Kept are the fragments' transitions and those of all units, and of scalars the slots before the units."""
        assert summary is not None and summary.transition is not None
        a = summary.transition
        exits = torch.stack(self._of_units(a, self.partition.last))
        own = self._packed(self.forward, summary.state, a, initial_state)
        message = torch.cat([own.flatten(), exits.flatten()])

        def arrive(gathered: Tensor) -> tuple[Tensor, Kept]:
            of_states, of_transitions = gathered.split([own.numel(), exits.numel()], 1)
            units = of_transitions.unflatten(1, exits.shape).flatten(0, 1)[:, :, 0]
            factors = torch.stack([units[place] for place in self.partition.layout.rank_order])
            combined = self.forward.combine(of_states.unflatten(1, own.shape), factors, self.partition.owned)
            states = self._entering(self.forward, combined, own, initial_state)
            if Transition.of(a, summary.state) == Transition.MATRIX:
                return states, (a, factors)
            before = self._of_units(states, self.partition.first)
            return states, (a, factors, self.backward.pack(before, self.partition.rank))

        return comm.all_gather(message, self.group).then(arrive)

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Any]:
        """An `Arriving` where gates are scalars, else its slots alone."""
        assert d_summary is not None
        a, factors, *rest = kept
        assert a is not None and factors is not None
        own = self._packed(self.backward, d_summary, a, d_final)
        if Transition.of(a, d_summary) == Transition.MATRIX:

            def arrive(rows: Tensor) -> Tensor:
                combined = self.backward.combine(rows, factors, self.partition.owned)
                return self._entering(self.backward, combined, own, d_final)

            return comm.all_gather(own, self.group).then(arrive)
        (before,) = rest
        assert before is not None
        plan = spread(self.forward, self.backward, self.partition.rank, own.device)

        def arrive_own(found: Tensor) -> Arriving:
            told = plan.through(own, found, before, factors)
            gates = comm.all_gather(told, self.group).then(plan.gates)
            slots = self.forward.unpacked(found, self.partition.rank)
            return Arriving(self._entering(self.backward, slots, own, d_final), gates)

        return comm.reduce_scatter(plan.wanted(own, factors), self.group).then(arrive_own)

    def leave(self, outgoing: Tensor) -> Tensor:
        return self._of_documents(self.backward, outgoing)

    def leave_grad(self, d_incoming: Tensor) -> Tensor:
        return self._of_documents(self.forward, d_incoming)

    def _of_units(self, x: Tensor, fragments: list[int]) -> list[Tensor]:
        """[N, ...] -> [B, ...] of some fragments, one of each of this rank's units."""
        rows = x.unflatten(0, (self.batch, -1))
        return [rows[:, fragment] for fragment in fragments]

    def _packed(self, side: Fenwick, states: Tensor, transitions: Tensor, documents: Tensor | None) -> Tensor:
        """[slots sent, B, H, K, V]: what leaves this rank's units. states, transitions: of the fragments."""
        exits = self.partition.first if side.backward else self.partition.last
        own, through = self._of_units(states, exits), self._of_units(transitions, exits)
        if documents is not None:
            for place, (unit, exit) in enumerate(zip(self.partition.owned, exits, strict=True)):
                if self._has_state(side, exit):
                    start = self._of_document(side, documents, exit)
                    own[place] = side.extend(resized(own[place], self.slots), through[place], start, unit)
        return side.pack(own, self.partition.rank)

    def _entering(self, side: Fenwick, units: list[Slots], like: Tensor, documents: Tensor | None) -> Tensor:
        """[N, J, H, K, V]: what enters every fragment, given what enters this rank's units. like: [..., B, H, K, V]."""
        entries = self.partition.last if side.backward else self.partition.first
        states = like.new_zeros(self.batch, len(self.partition.local), self.slots, *like.shape[-3:])
        for entry, slots in zip(entries, units, strict=True):
            if not self._is_closed(side, entry):
                for j, state in slots.items():
                    states[:, entry, j] = state
        if documents is not None:
            for fragment in range(len(self.partition.local)):
                if self._has_state(side, fragment):
                    states[:, fragment] = self._of_document(side, documents, fragment)
        return states.flatten(0, 1)

    def _is_closed(self, side: Fenwick, fragment: int) -> bool:
        """Whether its document begins (backward: ends) there; padding is no document."""
        f = self.partition.local[fragment]
        return f.document != PADDING and (f.ends if side.backward else f.begins)

    def _documents(self, side: Fenwick) -> Numbers[int]:
        """Those with a state of their own where they are closed."""
        return self.left if side.backward else self.entered

    def _has_state(self, side: Fenwick, fragment: int) -> bool:
        own = self.partition.local[fragment].document in self._documents(side)
        return own and self._is_closed(side, fragment)

    def _of_document(self, side: Fenwick, states: Tensor, fragment: int) -> Tensor:
        """[B, J, H, K, V]: that of a fragment's document."""
        place = self._documents(side).index(self.partition.local[fragment].document)
        return resized(states.unflatten(0, (self.batch, -1))[:, place], self.slots)

    def _of_documents(self, side: Fenwick, states: Tensor) -> Tensor:
        """[B · documents, J, ...] on every rank: those of the closed fragments of documents with a state of their own,
        which one rank has.

        side: where a document's fragment is closed: backward where it ends."""
        states = resized(states, self.slots).unflatten(0, (self.batch, -1))
        documents = self._documents(side)
        result = states.new_zeros(self.batch, len(documents), *states.shape[2:])
        for i, fragment in enumerate(self.partition.local):
            if self._has_state(side, i):
                result[:, documents.index(fragment.document)] = states[:, i]
        return comm.all_reduce(result.flatten(0, 1), self.group).wait()
