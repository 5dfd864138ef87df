"""Phase 2: the state passes from tile to tile of a segment, X -> A X + S (math §1), in reverse for gradients.

It is linear in what enters the segment, so that an exchange need not be waited for: with x_t what enters tile t of a
segment that nothing enters, and P_t the product of the transitions of the tiles before,

    X_t = x_t + P_t X        what leaves the segment = S + A X
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.segments import Tiles
from lasp.kernels.summary import Summary, Transition, apply
from lasp.kernels.triton.device import block_of, cdiv, next_power_of_2
from lasp.kernels.triton.launch import launch
from lasp.kernels.triton.pdl import griddepcontrol_wait
from lasp.kernels.triton.shared.matrix_passing import Bounds, add_incoming, pass_by_matrix

IDENTITY, SCALAR = tl.constexpr(int(Transition.IDENTITY)), tl.constexpr(int(Transition.SCALAR))


@triton.jit
def _pass_states(
    states,  # [M, H, K, V] summaries of the tiles (forward S, backward D)
    transitions,  # [M, H] or [M, H, K] logarithms
    start,  # [N, H, K, V] what enters each segment; None is zero
    initial,  # [M, H, K, V] what enters each tile
    end,  # [N, H, K, V] what leaves each segment
    passed,  # [M, H] or [M, H, K] the product of the transitions before each tile, unless None
    totals,  # [N, H] or [N, H, K] and that of all of a segment
    first,  # [N + 1] tiles of each segment
    H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TRANSITION: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    n, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.program_id(2)
    rows = (block // tl.cdiv(V, BV)) * BK + tl.arange(0, BK)
    cols = (block % tl.cdiv(V, BV)) * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    place = rows[:, None] * V + cols[None, :]
    griddepcontrol_wait()
    x = tl.zeros([BK, BV], tl.float32)
    if start is not None:
        x += tl.load(start + (n * H + h) * K * V + place, mask=inside, other=0.0)
    total = tl.zeros([BK], tl.float32)
    if TRANSITION == SCALAR:  # all rows have the same
        width, channels, writes = 1, rows * 0, (rows == 0) & (block == 0)
    else:
        width, channels, writes = K, rows, (rows < K) & (block % tl.cdiv(V, BV) == 0)
    low, high = tl.load(first + n).to(tl.int64), tl.load(first + n + 1).to(tl.int64)
    for i in tl.range(0, high - low, num_stages=4):  # or each load would wait for the store before it
        tile = ((high - 1 - i) if REVERSE else (low + i)) * H + h
        s = tl.load(states + tile * K * V + place, mask=inside, other=0.0)
        tl.store(initial + tile * K * V + place, x, mask=inside)
        if TRANSITION != IDENTITY:
            if passed is not None:
                tl.store(passed + tile * width + channels, total, mask=writes)
            if TRANSITION == SCALAR:
                log = tl.load(transitions + tile) + tl.zeros([BK], tl.float32)
            else:
                log = tl.load(transitions + tile * K + rows, mask=rows < K, other=0.0)
            x *= tl.exp(log)[:, None]
            total += log
        x += s
    tl.store(end + (n * H + h) * K * V + place, x, mask=inside)
    if passed is not None:
        tl.store(totals + (n * H + h) * width + channels, total, mask=writes)


@triton.jit
def load_initial_state(
    local, incoming, passed, owner, tile, h, H, place, inside, rows, K: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """The state that enters a tile (see InitialStates), at some places; rows: theirs if each has a decay, else None."""
    at = tile * H + h
    x = tl.load(local + at * K * V + place, mask=inside, other=0.0)
    if incoming is not None:
        segment = tl.load(owner + tile).to(tl.int64)
        came = tl.load(incoming + (segment * H + h) * K * V + place, mask=inside, other=0.0)
        if passed is not None:
            if rows is None:
                came *= tl.exp(tl.load(passed + at))
            else:
                came *= tl.exp(tl.load(passed + at * K + rows, mask=rows < K, other=0.0))[:, None]
        x += came
    return x


class InitialStates(NamedTuple):
    """What each tile starts from, in a reverse scan the gradient of its final state, fp32: `local` [M, H, K, V], and
    what comes into its segment, `incoming` [N, H, K, V] (None: nothing), after the transitions before the tile, whose
    product is `passed`."""

    local: Tensor
    incoming: Tensor | None = None
    passed: Tensor | None = None


class StatePassing:
    """From tile to tile, forward or in reverse, with transitions of any class (lasp.kernels.summary).

    ahead: it runs at once, which tells what the segments do to a state, `summary` (in reverse D and the transposed A),
    and leaves what comes in to those who read the tiles' initial states. Else it runs when that is there, and starts
    with it. bounds: on what matrices do to a state, if they are known.
    """

    final: Tensor | None = None  # nobody needs to write the segments' final states: see OneTile

    def __init__(
        self, tiles: Tiles, states: Tensor, transitions: Tensor | None, *, reverse: bool, ahead: bool,
        bounds: Bounds | None = None,
    ):  # fmt: skip
        self.transitions = transitions
        self.summary: Summary | None = None
        self._passed: Tensor | None = None
        self._over = tiles, states, transitions, reverse, bounds
        if ahead:
            totals = None
            if transitions is not None:
                self._passed = torch.empty_like(transitions)
                totals = transitions.new_empty(tiles.first.numel() - 1, *transitions.shape[1:])
            self._local, final = _pass(*self._over, None, self._passed, totals)
            self.summary = Summary(final, totals)

    def enter(self, incoming: Tensor | None) -> tuple[InitialStates, Pending[Tensor]]:
        """The tiles' initial states and the segments' final ones, [N, H, K, V], given what comes in; None is zero."""
        incoming = None if incoming is None else incoming.contiguous()
        if self.summary is None:
            initial, final = _pass(*self._over, incoming, None, None)
            return InitialStates(initial), Pending(lambda: final)
        state, total = self.summary.state, self.summary.transition
        if incoming is None:
            return InitialStates(self._local), Pending(lambda: state)
        return InitialStates(self._local, incoming, self._passed), Pending(lambda: state + apply(total, incoming))

    def enter_by_matrix(self, incoming: Tensor | None) -> tuple[Tensor | None, Pending[Tensor]]:
        """`enter` of a class whose transitions are matrices, which no other kernel applies on its way."""
        parts, final = self.enter(incoming)
        return add_incoming(self._over[0], *parts), final


class OneTile:
    """The same where every segment is one tile: nothing passes. Whoever scans the tiles writes their `final` states."""

    transitions = None

    def __init__(self, summary: Summary | None, final: Tensor):
        self.summary, self.final = summary, final

    def enter_by_matrix(self, incoming: Tensor | None) -> tuple[Tensor | None, Pending[Tensor]]:
        return None if incoming is None else incoming.contiguous(), Pending(lambda: self.final)


def _pass(
    tiles: Tiles,
    states: Tensor,
    transitions: Tensor | None,
    reverse: bool,
    bounds: Bounds | None,
    start: Tensor | None,
    passed: Tensor | None,
    totals: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What enters the tiles and what leaves the segments; fills `passed` and `totals`, if they are there."""
    kind = Transition.of(transitions, states)
    if transitions is not None and kind == Transition.MATRIX:
        return pass_by_matrix(tiles, states, transitions, reverse, bounds, start, passed, totals)
    heads, key_dim, value_dim = states.shape[1:]
    segments = tiles.first.numel() - 1
    initial, end = torch.empty_like(states), states.new_empty(segments, heads, key_dim, value_dim)
    block_k, block_v = min(32, next_power_of_2(key_dim)), min(64, block_of(value_dim))
    launch(
        _pass_states, (segments, heads, cdiv(key_dim, block_k) * cdiv(value_dim, block_v)),
        states, transitions, start, initial, end, passed, totals, tiles.first, heads,
        K=key_dim, V=value_dim, BK=block_k, BV=block_v, TRANSITION=kind.value, REVERSE=reverse, num_warps=4, pdl=True,
    )  # fmt: skip
    return initial, end
