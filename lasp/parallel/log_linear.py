"""Log-linear attention over the ranks of a sequence (math §4): what lies between the two halves of its op.

As for states that are affine maps (`AcrossUnits`), one summary leaves a unit, that of its last fragment, and one thing
enters it, for its first. But they are slots, and where these go depends on the positions of the fragments.
"""

from collections.abc import Callable
from collections.abc import Sequence as Numbers
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.fenwick import FenwickState, resized
from lasp.kernels.log_linear import check_levels, check_state, choose_op, seen_by
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Kept, run
from lasp.kernels.summary import Summary
from lasp.parallel import comm
from lasp.parallel.agreement import gradients, signature
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.fenwick import Fenwick, position
from lasp.parallel.layout import PADDING, Partition

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

    sequence._agree(method, check)
    (x,) = made
    return _exchanged(sequence, x, initial_state, output_final_state)


def _exchanged(
    sequence: "Sequence", x: LogLinearInputs, initial_state: FenwickState | None, output_final_state: bool
) -> tuple[Tensor, FenwickState | None]:
    partition, batch, seen = sequence.partition, x.segments.batch, _seen(sequence, initial_state)
    local, totals = sequence._local(batch), _totals(partition, seen)
    before = tuple(position(partition, seen, fragment) for fragment in partition.local) * batch
    x = x.cut({name: local.fold(tensor) for name, tensor in x.tensors.items()}, local.segments, before)
    entered, left = sequence._documents_with_states()
    boundary = sequence._alone() or AcrossSlots(partition, batch, sequence.parallel.group, seen, entered, left)
    slots = None if initial_state is None else resized(initial_state.slots, max(totals).bit_length())
    o, final = run(choose_op(x, "auto", boundary.wants_summary), boundary, x, slots, output_final_state)
    tokens = torch.tensor([totals[document] for document in left] * batch, device="cpu")
    return local.unfold(o), None if final is None else FenwickState(final, tokens)


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
    edges = partition.offsets
    return [had + stop - start for had, start, stop in zip(seen, edges, edges[1:], strict=False)]


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
        assert summary is not None
        a = summary.transition
        exits = None if a is None else self._of_units(a, self.partition.last)
        own = self._packed(self.forward, summary.state, exits, initial_state)
        message = own if exits is None else torch.cat([own.flatten(1), exits.flatten(1)], 1)

        def arrive(gathered: Tensor) -> tuple[Tensor, Kept]:
            rows, factors = gathered.flatten(0, 1), None
            if exits is not None:
                of_states, of_transitions = rows.split([own[0].numel(), exits[0].numel()], 1)
                rows = of_states.unflatten(1, own.shape[1:])
                factors = Fenwick.factors_of(of_transitions.unflatten(1, exits.shape[1:]), rows)
            return self._entering(self.forward, rows, factors, initial_state), (a, factors)

        return comm.all_gather(message, self.group).then(arrive)

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor]:
        assert d_summary is not None
        a, factors = kept
        exits = None if a is None else self._of_units(a, self.partition.first)
        own = self._packed(self.backward, d_summary, exits, d_final)
        gathered = comm.all_gather(own, self.group)
        return gathered.then(lambda rows: self._entering(self.backward, rows.flatten(0, 1), factors, d_final))

    def leave(self, outgoing: Tensor, initial_state: Tensor | None) -> Tensor:
        return self._of_documents(self.backward, outgoing)

    def leave_grad(self, d_incoming: Tensor, d_final: Tensor | None) -> Tensor:
        return self._of_documents(self.forward, d_incoming)

    def _of_units(self, x: Tensor, fragments: list[int]) -> Tensor:
        """[N, ...] -> [units of this rank, B, ...]: those of some fragments."""
        return x.unflatten(0, (self.batch, -1))[:, fragments].transpose(0, 1).contiguous()

    def _packed(self, side: Fenwick, states: Tensor, transition: Tensor | None, documents: Tensor | None) -> Tensor:
        """[units of this rank, B, slots sent, H, K, V]: what leaves every unit."""
        exits = self.partition.first if side.backward else self.partition.last
        own = self._of_units(resized(states, self.slots), exits)
        if documents is not None:
            for j, (unit, exit) in enumerate(zip(self.partition.owned, exits, strict=True)):
                if self._has_state(side, exit):
                    start = self._of_document(side, documents, exit)[None]
                    a = None if transition is None else transition[j : j + 1]
                    own[j : j + 1] = side.extend(own[j : j + 1], a, start, [unit])
        return side.pack(own, self.partition.owned)

    def _entering(self, side: Fenwick, gathered: Tensor, factors: Tensor | None, documents: Tensor | None) -> Tensor:
        """[N, J, H, K, V]: what enters every fragment, given what leaves every unit, in the order of ranks."""
        order = self.partition.layout.rank_order
        by_unit = [gathered[place] for place in order]
        of_units = None if factors is None else [factors[place] for place in order]
        units = side.combine(by_unit, of_units, self.partition.owned)
        entries = self.partition.last if side.backward else self.partition.first
        states = units.new_zeros(self.batch, len(self.partition.local), self.slots, *units.shape[3:])
        for entry, unit in zip(entries, units, strict=True):
            if not self._is_closed(side, entry):
                states[:, entry, : unit.shape[1]] = unit
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
