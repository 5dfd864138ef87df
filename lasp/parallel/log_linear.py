"""Log-linear attention over the ranks of a sequence (math §4): its functions, and what lies between an op's halves.

As for states that are affine maps (`AcrossUnits`), one summary leaves a unit, that of its last fragment, and one thing
enters it, for its first. But they are slots, and where these go depends on the positions of the fragments.
"""

import torch
from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.fenwick import FenwickState, resized
from lasp.kernels.log_linear import check_levels, check_log_linear, check_state, choose_op, seen_by
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Alone, Boundary, Kept, run
from lasp.kernels.summary import Summary
from lasp.parallel import Sequence, comm
from lasp.parallel.agreement import gradients, signature
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.fenwick import Fenwick
from lasp.parallel.layout import PADDING, Partition


def log_linear_attention(
    sequence: Sequence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    level_scales: Tensor,
    *,
    scale: float | None = None,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, FenwickState | None]:
    """`lasp.kernels.log_linear_attention` over the whole sequence, which must be `aligned`.

    q, k, v, decay, level_scales are this rank's; initial and final state are the same on every rank, and so are their
    gradients; all rows of a batch have seen as many tokens.
    """
    return _run(
        "log_linear_attention", sequence, q, k, v, decay, level_scales, None, scale, initial_state, output_final_state
    )


def log_linear_delta_rule(
    sequence: Sequence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    level_scales: Tensor,
    *,
    scale: float | None = None,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, FenwickState | None]:
    """`lasp.kernels.log_linear_delta_rule` over the whole sequence, with states as in `log_linear_attention`."""
    return _run(
        "log_linear_delta_rule", sequence, q, k, v, decay, level_scales, beta, scale, initial_state, output_final_state
    )


def _run(method, sequence, q, k, v, decay, level_scales, beta, scale, initial_state, output_final_state):
    q, k, v = autocast.unify(q, k, v)
    partition: Partition = sequence.partition

    def check() -> dict:
        checks.tensor(*(("decay", decay) if method == "log_linear_attention" else ("beta", beta)))
        check_log_linear(q, k, v, decay, level_scales, beta)
        sequence._check_tokens(v)
        check_state(initial_state, v.shape[0] * partition.documents, v, k.shape[-1])
        _check_units(sequence)
        seen = seen_by(initial_state, v.shape[0] * partition.documents)
        same = set(seen) if partition.documents == 1 else {0}
        checks.require(len(same) <= 1, "initial_state.tokens", sorted(same), "the same number for all rows of a batch")
        check_levels(level_scales.shape[-1], torch.tensor(_totals(partition, seen), device="cpu"))
        slots = None if initial_state is None else initial_state.slots
        asked = gradients(q, k, v, decay, level_scales, beta, slots) | gradients(slots, of="initial_state")
        options = {
            "scale": checks.scale(scale, k.shape[-1]),
            "output_final_state": bool(output_final_state),
            "seen": seen,
        }
        return signature(q=q, v=v, decay=decay, level_scales=level_scales, beta=beta, slots=slots) | asked | options

    sequence._agree(method, check)
    return _exchanged(sequence, q, k, v, decay, level_scales, beta, scale, initial_state, output_final_state)


@torch.compiler.disable  # messages have no place in a graph
def _exchanged(sequence, q, k, v, decay, level_scales, beta, scale, initial_state, output_final_state):
    partition, batch = sequence.partition, v.shape[0]
    local = sequence._local(batch)
    seen = seen_by(initial_state, batch * partition.documents)
    before = tuple(f.position + (0 if f.document == PADDING else seen[f.document]) for f in partition.local) * batch
    given = {"q": q, "k": k, "v": v, "decay": decay, "level_scales": level_scales, "beta": beta}
    tensors = {name: None if x is None else local.fold(x) for name, x in given.items()}
    scale = checks.scale(scale, k.shape[-1])
    x = LogLinearInputs(**tensors, scale=scale, segments=local.segments, seen=before)  # type: ignore[arg-type]
    boundary: Boundary = AcrossSlots(partition, batch, sequence.parallel.group, seen)
    if partition.layout.units == 1 and len(partition.local) == partition.documents:
        boundary = Alone()
    most = max(_totals(partition, seen)).bit_length()
    slots = None if initial_state is None else resized(initial_state.slots, most)
    o, final = run(choose_op(x, "auto", boundary.wants_summary), boundary, x, slots, output_final_state)
    totals = torch.tensor(_totals(partition, seen) * (batch if partition.documents == 1 else 1), device="cpu")
    return local.unfold(o), None if final is None else FenwickState(final, totals)


def _check_units(sequence: Sequence) -> None:
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

    seen: what every document has had before this sequence.
    """

    wants_summary = True

    def __init__(self, partition: Partition, batch: int, group: Group, seen: tuple[int, ...]):
        self.partition, self.group, self.batch = partition, group, batch
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
                if self._is_closed(side, exit):
                    start = self._of_document(documents, exit)[None]
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
                if self._is_closed(side, fragment):
                    states[:, fragment] = self._of_document(documents, fragment)
        return states.flatten(0, 1)

    def _is_closed(self, side: Fenwick, fragment: int) -> bool:
        """Whether its document begins (backward: ends) there; padding is no document."""
        f = self.partition.local[fragment]
        return f.document != PADDING and (f.ends if side.backward else f.begins)

    def _of_document(self, states: Tensor, fragment: int) -> Tensor:
        """[B, J, H, K, V]: that of a fragment's document."""
        document = self.partition.local[fragment].document
        return resized(states.unflatten(0, (self.batch, -1))[:, document], self.slots)

    def _of_documents(self, side: Fenwick, states: Tensor) -> Tensor:
        """[documents, J, ...] on every rank: that of the document's closed fragment, which one rank has.

        side: where a document's fragment is closed: backward where it ends."""
        states = resized(states, self.slots).unflatten(0, (self.batch, -1))
        result = states.new_zeros(self.batch, self.partition.documents, *states.shape[2:])
        for i, fragment in enumerate(self.partition.local):
            if self._is_closed(side, i):
                result[:, fragment.document] = states[:, i]
        return comm.all_reduce(result.flatten(0, 1), self.group).wait()
