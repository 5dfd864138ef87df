"""The delta rule as an op of two halves per direction (see lasp.kernels.recurrence).

forward    T of every chunk (with a diagonal decay first q and k times their decays, and scores); tiles' summaries
           (S, A); scan; outputs, walking up
backward   tiles' summaries D, walking down; scan; then for some heads at a time: the state of every chunk and u (up),
           its gradient and dr (down), and all gradients chunk by chunk (for Hopper in that walk down)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Inputs, Kept
from lasp.kernels.segments import Tiles
from lasp.kernels.summary import Summary
from lasp.kernels.triton.config import GLUON, cdiv, multiprocessors
from lasp.kernels.triton.delta_config import (
    OUTPUTS,
    STATES,
    SUMMARY,
    DeltaConfig,
    delta_config,
    walks_on_hopper,
)
from lasp.kernels.triton.delta_costates import walk_down
from lasp.kernels.triton.delta_diagonal import Factors, diagonal_factors
from lasp.kernels.triton.delta_grads import gradients
from lasp.kernels.triton.delta_scan import add_incoming
from lasp.kernels.triton.delta_states import summaries, walk_up
from lasp.kernels.triton.delta_steep import steep_gradients, steep_scores
from lasp.kernels.triton.delta_wy import CHUNK, chunk_scores, wy_inverse
from lasp.kernels.triton.gates import DIAGONAL, NONE, SCALAR
from lasp.kernels.triton.linear import contiguous, laid_out, per_q_head
from lasp.kernels.triton.scan import Scan

if GLUON:
    from lasp.kernels.triton.hopper.delta_down import walk_down as gradients_on_hopper

ENOUGH_WALKS = 96  # walks of whole segments, if there are that many, are worth more than shorter ones with transitions
SHORTEST_TILE = 256
# Backward holds the states of all chunks for so many heads or tokens x heads, and as many gradients of states, unless a
# walk gives all gradients.
HEADS_AT_ONCE, TOKENS_AT_ONCE = 4, 2**19


@dataclass(frozen=True)
class Plan:
    """How a call is cut. whole: every segment is one tile, so that a tile's end is its segment's.  shared: what every
    walk is told.  heads: how many of them backward treats at a time."""

    config: DeltaConfig
    tiles: Tiles
    chunks: Tiles
    whole: bool
    shared: dict[str, Any]
    heads: int

    @staticmethod
    def of(x: Inputs) -> "Plan":
        (batch, tokens, heads, value_dim), device = x.v.shape, x.v.device
        config = delta_config(x.k, x.v, x.decay is not None, is_diagonal(x.decay))
        walks = config.walk.at_once(value_dim, multiprocessors(device))
        decay = walk_class(x.decay)
        held = 1 if walks_on_hopper(x.k, x.v, decay) else 2
        some = min(heads, max(HEADS_AT_ONCE, TOKENS_AT_ONCE // (held * batch * tokens)))
        size = tile_length(x, max(1, walks // some))
        tiles, chunks = x.segments.tiles(size, device), x.segments.tiles(CHUNK, device)
        whole = x.segments.cu_seqlens is None and tokens <= size
        shared = {"first_chunk": x.segments.first_chunks(size, CHUNK, device), "decay": decay}
        return Plan(config, tiles, chunks, whole, shared, min(heads, max(some, walks // tiles.count)))

    def new_states(self, x: Inputs) -> Tensor:
        """[M, H, K, V] in fp32, one for every tile, not written."""
        return x.v.new_empty(self.tiles.count, *x.state_shape[1:], dtype=torch.float32)


def walk_class(decay: Tensor | None) -> int:
    """Of a decay in the walks: NONE, SCALAR (a constant one, too) or DIAGONAL, as a number."""
    return (NONE if decay is None else DIAGONAL if is_diagonal(decay) else SCALAR).value


def is_diagonal(decay: Tensor | None) -> bool:
    return decay is not None and decay.ndim == 4


def factors_of(x: Inputs, plan: Plan, with_scores: bool) -> tuple[Factors, Tensor | None, Tensor | None]:
    """What the walks read and write with, and for a diagonal decay, if asked for, P and the products for T."""
    if not is_diagonal(x.decay):
        return Factors(x.q, x.k, x.k), None, None
    assert x.decay is not None
    scale = x.scale if with_scores else None
    factors, scores, products = diagonal_factors(plan.chunks, x.q, x.k, x.decay, work_dtype(x), plan.config, scale)
    if with_scores:
        assert factors.spread is not None and scores is not None and products is not None
        steep_scores(plan.chunks, x.q, x.k, x.decay, factors.spread, scores, products, x.scale, plan.config)
    return factors, scores, products


def work_dtype(x: Inputs) -> torch.dtype:
    """Of the products' operands: a state may exceed what fp16 holds."""
    return torch.bfloat16 if x.v.dtype == torch.bfloat16 else torch.float32


def tile_length(x: Inputs, wanted: int) -> int:
    """Tokens per tile: whole segments if there are many, else what makes at most `wanted` tiles, if not too short."""
    batch, tokens, heads, value_dim = x.v.shape
    longest = (
        2**31 // (heads * max(x.k.shape[-1], value_dim, CHUNK)) // CHUNK * CHUNK - CHUNK
    )  # 32-bit offsets within a tile
    whole = x.segments.cu_seqlens is None and batch * heads >= ENOUGH_WALKS
    length = tokens if whole else max(SHORTEST_TILE, cdiv(tokens, max(1, wanted // batch)))
    return min(cdiv(length, CHUNK) * CHUNK, longest)


@dataclass(frozen=True)
class TritonDelta:
    """Any decay. Kept for backward: T and P of every chunk (each 64 / K of the size of k), four
    numbers per token and head, and for every tile its entering state and, unless it is a segment, its transition."""

    def summarize(self, x: Inputs, wanted: bool):
        x, plan = contiguous(x), Plan.of(x)
        assert x.beta is not None
        factors, scores, products = factors_of(x, plan, with_scores=True)
        wy, gates = wy_inverse(plan.chunks, x.k, x.decay, x.beta, products, work_dtype(x))
        if plan.whole and not wanted:
            return None, (x, plan, factors, scores, wy, gates, None)
        states = plan.new_states(x)
        transitions = states.new_empty(*states.shape[:3], states.shape[2])
        summaries(plan.tiles, factors, x.v, gates, wy, plan.config, states, transitions, **plan.shared)
        if plan.whole:
            return Summary(states, transitions), (x, plan, factors, scores, wy, gates, None)
        scan = Scan(plan.tiles, states, transitions, down=False, ahead=wanted)
        return scan.summary, (x, plan, factors, scores, wy, gates, scan)

    def finish(self, x: Inputs, partial, incoming: Pending[Tensor | None]) -> tuple[Tensor, Pending[Tensor], Kept]:
        x, plan, factors, scores, wy, gates, scan = partial
        if walks_on_hopper(x.k, x.v, plan.shared["decay"]):
            scores = torch.empty_like(wy)
        elif scores is None:
            scores = chunk_scores(
                plan.chunks, x.q, x.k, gates, plan.shared["decay"], wy, x.scale, plan.config.precision
            )
        start = incoming.wait()
        if plan.whole:
            entering = None if start is None else start.contiguous()
            end, outgoing = _written(plan.new_states(x))
        else:
            end, (parts, outgoing) = None, scan.enter(start)
            entering = add_incoming(plan.tiles, *parts)
        o = torch.empty_like(x.v)
        walk_up(
            OUTPUTS, plan.tiles, factors, x.v, gates, wy, scores, plan.config,
            scale=x.scale, entering=entering, end=end, o=o, **plan.shared,
        )  # fmt: skip
        return o, outgoing, (wy, scores, gates, entering, None if plan.whole else scan.transitions)

    def summarize_grad(self, x: Inputs, kept, do: Tensor, wanted: bool):
        x, do, plan, (wy, scores, gates, _, transitions) = contiguous(x), laid_out(do), Plan.of(x), kept
        factors, _, _ = factors_of(x, plan, with_scores=False)
        if plan.whole and not wanted:
            return None, (x, do, plan, factors, None)
        d = plan.new_states(x)
        walk_down(SUMMARY, plan.tiles, factors, do, gates, wy, scores, plan.config, x.scale, end=d, **plan.shared)
        if plan.whole:
            return d, (x, do, plan, factors, None)
        scan = Scan(plan.tiles, d, transitions, down=True, ahead=wanted)
        return scan.summary and scan.summary.state, (x, do, plan, factors, scan)

    def finish_grad(self, x: Inputs, kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        (x, do, plan, factors, scan), (wy, scores, gates, entering, _) = partial, kept
        assert x.beta is not None
        (batch, tokens, heads, value_dim), key_dim = x.v.shape, x.k.shape[-1]
        at_once = walks_on_hopper(x.k, x.v, plan.shared["decay"])  # a walk that gives all gradients
        per_head = x.q.dtype if at_once or x.q.shape[2] == heads else torch.float32
        dq, dk = (x.q.new_empty(batch, tokens, heads, key_dim, dtype=per_head) for _ in range(2))
        learned = x.decay if x.decay is not None and x.decay.ndim > 1 else None
        d_decay = None if learned is None else torch.empty_like(learned)
        found = dq, dk, torch.empty_like(x.v), d_decay, torch.empty_like(x.beta)
        some = plan.heads
        u = wy.new_empty(batch, tokens, some, value_dim)
        chunk_states = wy.new_empty(plan.chunks.count, some, value_dim, key_dim)
        dr, chunk_grads = (None, None) if at_once else (torch.empty_like(u), torch.empty_like(chunk_states))
        for first in range(0, heads, some):
            part = range(first, min(first + some, heads))
            where = {**plan.shared, "head_range": part}
            walk_up(
                STATES, plan.tiles, factors, x.v, gates, wy, None, plan.config,
                entering=entering, u=u, states=chunk_states, overlaps=scan is not None and first == 0, **where,
            )  # fmt: skip
            if first == 0:
                last = d_outgoing.wait()
                if plan.whole:
                    leaving = None if last is None else last.contiguous()
                    end, d_incoming = _written(plan.new_states(x))
                else:
                    end, (parts, d_incoming) = None, scan.enter(last)
                    leaving = add_incoming(plan.tiles, *parts)
            if at_once:
                gradients_on_hopper(
                    plan.tiles, x.q, x.k, do, gates, wy, scores, x.scale, leaving, end, plan.shared["first_chunk"],
                    plan.shared["decay"], part, given=(x.v, u, chunk_states), learned=learned, found=found,
                )  # fmt: skip
                continue
            assert dr is not None and chunk_grads is not None
            walk_down(
                STATES, plan.tiles, factors, do, gates, wy, scores, plan.config, x.scale,
                leaving=leaving, end=end, dr=dr, grads=chunk_grads, **where,
            )  # fmt: skip
            gradients(
                plan.chunks, x.q, x.k, x.v, do, x.decay, factors.spread, gates, u, dr, chunk_states, chunk_grads,
                found, x.scale, plan.shared["decay"], plan.config, part,
            )  # fmt: skip
            if factors.spread is not None:
                assert x.decay is not None
                steep_gradients(
                    plan.chunks, x.q, x.k, do, x.decay, gates, factors.spread, u, dr, found, x.scale, plan.config, part
                )
        return Gradients(per_q_head(dq, x.q), per_q_head(dk, x.q), *found[2:], d_incoming)


def _written(states: Tensor) -> tuple[Tensor, Pending[Tensor]]:
    """Where a walk will write states, and these states."""
    return states, Pending(lambda: states)
