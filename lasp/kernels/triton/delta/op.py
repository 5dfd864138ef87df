"""The delta rule as an op of two halves per direction (see lasp.kernels.recurrence).

forward    T of every chunk (with a diagonal decay first q and k times their decays, and scores); tiles' summaries
           (S, A); state passing; outputs, a forward scan over chunks
backward   tiles' summaries D, in a reverse scan; state passing; then for some heads at a time: u and the state of every
           chunk, in a forward scan, and from them all gradients, in a reverse scan
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.layouts import laid_out
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients
from lasp.kernels.segments import Cut
from lasp.kernels.summary import Summary
from lasp.kernels.triton.delta.backend import Backend, Grads, Recomputed, Terms, summed_in_fp32
from lasp.kernels.triton.delta.config import HopperLaunch, delta_config, has_hopper_kernels, scan_decay
from lasp.kernels.triton.delta.portable import Portable
from lasp.kernels.triton.device import GLUON, cdiv, for_hopper, multiprocessors
from lasp.kernels.triton.shared.matrix_passing import Bounds
from lasp.kernels.triton.shared.operands import contiguous, per_q_head
from lasp.kernels.triton.shared.state_passing import OneTile, StatePassing
from lasp.kernels.triton.shared.tiles import CHUNK

if GLUON:
    from lasp.kernels.triton.hopper.delta import Hopper, HopperDiagonal

ENOUGH_SCANS = 96  # scans of whole segments, if there are that many, are worth more than shorter ones with transitions
SHORTEST_TILE = 256
# Backward holds the states of all chunks, and with some backends their gradients, for so many heads or tokens x heads.
HEADS_AT_ONCE, TOKENS_AT_ONCE = 4, 2**19


class Plan(NamedTuple):
    """How a call is cut, and the kernels that serve it. one_tile: every segment is one tile. Backward takes a head in
    `parts` of its columns of V, `at_once` parts at a time, `step` apart: dq and dk are summed over so many as it comes
    to them."""

    cut: Cut
    kernels: Backend
    one_tile: bool
    parts: int
    at_once: int
    step: int

    @classmethod
    def of(cls, x: DeltaInputs) -> "Plan":
        (batch, tokens, heads, value_dim), key_dim, device = x.v.shape, x.k.shape[-1], x.v.device
        decay, hopper = scan_decay(x.decay), HopperLaunch.of(key_dim, value_dim) if has_hopper_kernels(x) else None
        config = delta_config(x.k, x.v, decay != Decay.NONE, decay == Decay.DIAGONAL)
        parts, scans, states_at_once = 1, config.states.at_once(value_dim, multiprocessors(device)), 2
        if hopper is not None:
            parts, scans, states_at_once = hopper.parts, hopper.programs * multiprocessors(device), 1
        rows, group = heads * parts, heads // x.q.shape[2] * parts
        some = min(rows, max(HEADS_AT_ONCE, TOKENS_AT_ONCE // (states_at_once * batch * tokens)))
        size = delta_tile_length(x, max(1, scans // some))
        cut = x.segments.cut(size, CHUNK, device)
        at_once = max(some, scans // cut.tiles.count)
        kernels: Backend = Portable(cut, config) if hopper is None else Hopper(cut, hopper)
        if decay == Decay.DIAGONAL and for_hopper(x.k, x.v):
            kernels = HopperDiagonal(cut, HopperLaunch.of(key_dim, value_dim), config)
        steps = (n for n in range(group, parts, -parts) if group % n == 0 and rows // n >= at_once)
        return cls(
            cut=cut,
            kernels=kernels,
            one_tile=x.segments.cu_seqlens is None and tokens <= size,
            parts=parts,
            at_once=min(rows, at_once),
            step=next(steps, parts),
        )

    def new_states(self, x: DeltaInputs) -> Tensor:
        """[M, H, K, V] in fp32, one for every tile, not written."""
        return x.v.new_empty(self.cut.tiles.count, *x.state_shape[1:], dtype=torch.float32)

    def passing(
        self, terms: Terms, states: Tensor, transitions: Tensor | None, *, reverse: bool, ahead: bool
    ) -> StatePassing:
        bounds = None if terms.log2_bounds is None else Bounds(terms.log2_bounds, self.cut.first_chunk)
        return StatePassing(self.cut.tiles, states, transitions, reverse=reverse, ahead=ahead, bounds=bounds)

    def passes(self, heads: int) -> Iterator[range]:
        """The parts of heads that backward treats at a time; those whose dq and dk are summed follow each other."""
        sums = heads * self.parts // self.step
        for place in range(self.step):
            for first in range(0, sums, self.at_once):
                yield range(first * self.step + place, min(first + self.at_once, sums) * self.step, self.step)


def delta_tile_length(x: DeltaInputs, wanted: int) -> int:
    """Tokens per tile: whole segments if there are many, else what makes at most `wanted` tiles, if not too short."""
    batch, tokens, heads, value_dim = x.v.shape
    row = heads * max(x.k.shape[-1], value_dim, CHUNK)
    longest = 2**31 // row // CHUNK * CHUNK - CHUNK  # 32-bit offsets within a tile
    whole = x.segments.cu_seqlens is None and batch * heads >= ENOUGH_SCANS
    length = tokens if whole else max(SHORTEST_TILE, cdiv(tokens, max(1, wanted // batch)))
    return min(cdiv(length, CHUNK) * CHUNK, longest)


@dataclass(frozen=True)
class TritonDelta:
    """Any decay. Kept for backward: T and P of every chunk (each 64 / K of the size of k), four numbers per token and
    head, one per chunk, and for every tile its initial state and, unless it is a segment, its transition."""

    def summarize(self, x: DeltaInputs, wanted: bool):
        x, plan = contiguous(x), Plan.of(x)
        terms = plan.kernels.terms(x)
        passing: StatePassing | OneTile
        if plan.one_tile:
            summary = self._summary(x, plan, terms) if wanted else None
            passing = OneTile(summary, plan.new_states(x))
        else:
            summary = self._summary(x, plan, terms)
            passing = plan.passing(terms, summary.state, summary.transition, reverse=False, ahead=wanted)
        return passing.summary, (x, plan, terms, passing)

    def finish(self, x: DeltaInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        x, plan, terms, passing = partial
        terms = plan.kernels.with_scores(x, terms)
        initial, final_states = passing.enter_by_matrix(incoming.wait())
        o = plan.kernels.outputs(x, terms, initial, passing.final)
        return o, final_states, (*terms.kept, initial, passing.transitions)

    def summarize_grad(self, x: DeltaInputs, kept, do: Tensor, wanted: bool):
        x, do, plan = contiguous(x), laid_out(do), Plan.of(x)
        *known, _, transitions = kept
        terms = plan.kernels.terms_again(x, *known)
        passing: StatePassing | OneTile
        if plan.one_tile and not wanted:
            passing = OneTile(None, plan.new_states(x))
        else:
            d_states = plan.new_states(x)
            plan.kernels.tile_states_grad(x, terms, do, d_states)
            if plan.one_tile:
                passing = OneTile(Summary(d_states), plan.new_states(x))
            else:
                passing = plan.passing(terms, d_states, transitions, reverse=True, ahead=wanted)
        return passing.summary and passing.summary.state, (x, do, plan, terms, passing)

    def finish_grad(self, x: DeltaInputs, kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, do, plan, terms, passing), (*_, initial, _) = partial, kept
        grads, recomputed = self._new_grads(x, plan), self._new_recomputed(x, plan, terms.ut)
        enter = cache(lambda: passing.enter_by_matrix(d_outgoing.wait()))
        for heads in plan.passes(x.v.shape[2]):
            room = recomputed.of(len(heads))
            pdl = not plan.one_tile and heads.start == 0  # the kernel before is one of state passing
            plan.kernels.recompute(x, terms, initial, heads, room, pdl)
            d_final, d_incoming = enter()
            plan.kernels.gradients(x, terms, do, room, d_final, passing.final, heads, grads)
        dq, dk = (per_q_head(d, x.q) for d in (grads.dq, grads.dk))
        of = {"q": dq, "k": dk, "v": grads.dv, "decay": grads.d_decay, "beta": grads.d_beta.to(x.beta.dtype)}
        return Gradients(of, d_incoming)

    @staticmethod
    def _summary(x: DeltaInputs, plan: Plan, terms: Terms) -> Summary:
        """S and A of every tile."""
        states = plan.new_states(x)
        transitions = states.new_empty(*states.shape[:3], states.shape[2])
        plan.kernels.tile_states(x, terms, states, transitions)
        return Summary(states, transitions)

    @staticmethod
    def _new_grads(x: DeltaInputs, plan: Plan) -> Grads:
        (batch, tokens, heads, _), key_dim = x.v.shape, x.k.shape[-1]
        shape = batch, tokens, heads * plan.parts // plan.step, key_dim
        if summed_in_fp32(plan.step):
            dq, dk = (x.q.new_zeros(shape, dtype=torch.float32) for _ in range(2))
        else:
            dq, dk = (x.q.new_empty(shape) for _ in range(2))
        d_decay = torch.empty_like(x.decay) if x.decay is not None and x.decay_class.learned else None
        added = plan.kernels.adds_d_beta
        d_beta = torch.zeros_like(x.beta, dtype=torch.float32) if added else torch.empty_like(x.beta)
        return Grads(dq, dk, torch.empty_like(x.v), d_decay, d_beta)

    @staticmethod
    def _new_recomputed(x: DeltaInputs, plan: Plan, ut: Tensor) -> Recomputed:
        (batch, tokens, _, value_dim), key_dim = x.v.shape, x.k.shape[-1]
        columns = value_dim // plan.parts
        return Recomputed(
            ut.new_empty(batch, tokens, plan.at_once, columns),
            ut.new_empty(plan.cut.chunks.count, plan.at_once, columns, key_dim),
        )
