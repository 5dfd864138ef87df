"""A new op gets sequence parallelism for nothing: these two are written here and nowhere else.

One is affine, with two states of different decays. The other is not, and brings the algebra of its states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.inputs import Inputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept
from lasp.kernels.summary import Summary
from lasp.parallel import SequenceParallel
from lasp.parallel.boundary import AcrossUnits
from tests.parallel.inputs import F64, error

HEADS, V = 2, 3
RATES = (0.9, 0.5)


@dataclass(frozen=True)
class Tokens(Inputs):
    """x [B, T, H, V]; a state is `states` rows of it."""

    x: Tensor
    states: int = 1

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.segments.count, self.x.shape[2], self.states, self.x.shape[3]

    def segment(self, x: Tensor, n: int) -> Tensor:
        """[tokens, H, 1, V] of segment n, a view."""
        return x.flatten(0, 1)[self.segments.offsets[n] : self.segments.offsets[n + 1], :, None]

    def zero(self) -> Tensor:
        return self.x.new_zeros(self.state_shape)


class MovingAverages:
    """s_t = γ s_{t-1} + x_t for two γ, o_t = the difference of both."""

    def __init__(self) -> None:
        self.ln_rates = torch.tensor(RATES, dtype=F64).log()
        self.rates, self.signs = (torch.tensor(x, dtype=F64)[None, :, None] for x in (RATES, (1.0, -1.0)))

    def scan(self, x: Tokens, tokens: Tensor, start: Tensor, weight: Tensor | float, *, reverse: bool = False):
        """s_t of all tokens, s_t = γ s_{t-1} + weight · tokens, and the last of each segment."""
        states, last = x.x.new_empty(*x.x.shape[:3], x.states, x.x.shape[3]).flatten(0, 1), start.clone()
        for n in range(x.segments.count):
            rows = range(int(x.segments.offsets[n]), int(x.segments.offsets[n + 1]))
            for t in reversed(rows) if reverse else rows:
                last[n] = self.rates * last[n] + weight * tokens.flatten(0, 1)[t, :, None]
                states[t] = last[n]
        return states.unflatten(0, x.x.shape[:2]), last

    def summarize(self, x: Tokens, wanted: bool):
        lengths = x.segments.offsets.diff()[:, None, None].double()
        transition = (lengths * self.ln_rates).expand(-1, x.x.shape[2], -1).contiguous()
        return Summary(self.scan(x, x.x, x.zero(), 1.0)[1], transition), None

    def finish(self, x: Tokens, partial, incoming: Pending[Tensor | None]) -> Finished:
        start = incoming.wait()
        states, last = self.scan(x, x.x, x.zero() if start is None else start, 1.0)
        return (states * self.signs).sum(3), Pending(lambda: last), ()

    def summarize_grad(self, x: Tokens, kept: Kept, do: Tensor, wanted: bool):
        return self.rates * self.scan(x, do, x.zero(), self.signs, reverse=True)[1], do

    def finish_grad(self, x: Tokens, kept: Kept, do: Tensor, d_outgoing: Pending[Tensor | None]) -> Gradients:
        end = d_outgoing.wait()
        start = x.zero() if end is None else end / self.rates
        ds, first = self.scan(x, do, start, self.signs, reverse=True)
        return Gradients({"x": ds.sum(3)}, Pending(lambda: self.rates * first))


class Maximum:
    """o_t = max(x_1 … x_t), of numbers that are not negative: a state of zero is as good as none."""

    def summarize(self, x: Tokens, wanted: bool):
        largest = torch.stack([x.segment(x.x, n).amax(0) for n in range(x.segments.count)])
        return Summary(largest, largest.clone()), None  # the algebra needs it again in backward

    def finish(self, x: Tokens, partial, incoming: Pending[Tensor | None]) -> Finished:
        start, o = incoming.wait(), torch.empty_like(x.x)
        start = x.zero() if start is None else start
        for n in range(x.segments.count):
            x.segment(o, n).copy_(torch.maximum(x.segment(x.x, n).cummax(0).values, start[n]))
        final = torch.stack([x.segment(o, n)[-1] for n in range(x.segments.count)])
        return o, Pending(lambda: final), (start, o)

    def summarize_grad(self, x: Tokens, kept: Kept, do: Tensor, wanted: bool):
        start, o = kept
        d = [(x.segment(do, n) * (x.segment(o, n) == start[n])).sum(0) for n in range(x.segments.count)]
        return torch.stack(d), do

    def finish_grad(self, x: Tokens, kept: Kept, do: Tensor, d_outgoing: Pending[Tensor | None]) -> Gradients:
        end, dx, (_, o) = d_outgoing.wait(), torch.empty_like(x.x), kept
        for n in range(x.segments.count):
            own, largest, d = (x.segment(y, n) for y in (x.x, o, do))
            into = [(d * (largest == y)).sum(0) for y in own]
            x.segment(dx, n).copy_(torch.stack(into))
            if end is not None:
                x.segment(dx, n).add_(end[n] * (own == largest[-1]))
        return Gradients({"x": dx}, Pending(x.zero))


@dataclass(frozen=True)
class MaximumOfUnits:
    """X_c = max of the S before, G_c = Σ D of those behind that still see the maximum up to c; of one document."""

    breaks: tuple[bool, ...]
    backward: bool

    def factors_of(self, transitions: Tensor, states: Tensor) -> Tensor:
        return transitions

    def combine(self, states: Sequence[Tensor], factors: Sequence[Tensor], units: Sequence[int]) -> Tensor:
        def largest(count: int) -> Tensor:
            return torch.stack([torch.zeros_like(factors[0]), *factors[:count]]).amax(0)

        if not self.backward:
            return torch.stack([largest(unit) for unit in units])
        behind = [range(unit + 1, len(states)) for unit in units]
        return torch.stack(
            [
                sum((states[c] * (largest(c) == largest(unit + 1)) for c in later), torch.zeros_like(states[0]))
                for unit, later in zip(units, behind, strict=True)
            ]
        )

    def extend(self, state: Tensor, transition: Tensor | None, start: Tensor) -> Tensor:
        raise NotImplementedError


ACROSS_MAXIMA = partial(AcrossUnits, algebra=MaximumOfUnits)


def moving_averages(x: Tensor, offsets: list[int], start: Tensor) -> tuple[Tensor, Tensor]:
    rates, signs = (torch.tensor(y, dtype=F64)[None, :, None] for y in (RATES, (1.0, -1.0)))
    outputs, finals = [], []
    for n, (begin, end) in enumerate(pairwise(offsets)):
        state = start[n]
        for t in range(begin, end):
            state = rates * state + x[0, t, :, None]
            outputs.append((signs * state).sum(1))
        finals.append(state)
    return torch.stack(outputs)[None], torch.stack(finals)


@pytest.mark.mpi
@pytest.mark.parametrize("exchange", ["all_gather", "scan", "symmetric_memory"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.cpu_only("the ops are written for it")
def test_an_affine_op(group: dist.ProcessGroup, gen, layout: str, exchange: str):
    offsets = [0, 2, 15, 37]
    documents = len(offsets) - 1
    x, start = torch.rand(1, 37, HEADS, V, generator=gen, dtype=F64), torch.rand(documents, HEADS, 2, V, generator=gen)
    x, start = x.requires_grad_(), start.double().requires_grad_()
    wanted = moving_averages(x, offsets, start)
    upstream = [torch.rand(y.shape, generator=gen, dtype=F64) for y in wanted]
    wanted += torch.autograd.grad(wanted, [x, start], upstream)

    parallel = SequenceParallel(group, layout=layout, state_exchange=exchange)
    sequence = parallel.sequence(37, torch.tensor(offsets))
    local = sequence.shard(x.detach()).requires_grad_()
    inputs = Tokens(local, states=2)
    found = sequence.run(MovingAverages(), inputs, initial_state=start, output_final_state=True)
    dx, d_start = torch.autograd.grad(found, [local, start], [sequence.shard(upstream[0]), upstream[1]])
    got = sequence.unshard(found[0].detach()), found[1], sequence.unshard(dx), d_start
    assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-10


@pytest.mark.mpi
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.cpu_only("the ops are written for it")
def test_an_op_with_an_algebra_of_its_own(group: dist.ProcessGroup, gen, layout: str):
    x, do = (torch.rand(2, 37, HEADS, V, generator=gen, dtype=F64) for _ in range(2))
    x = (x + torch.arange(37)[None, :, None, None] / 100).requires_grad_()  # so that later ranks win, too
    wanted = x.cummax(1).values
    (dx,) = torch.autograd.grad(wanted, x, do)

    sequence = SequenceParallel(group, layout=layout).sequence(37)
    local = sequence.shard(x.detach()).requires_grad_()
    o, _ = sequence.run(Maximum(), Tokens(local), across=ACROSS_MAXIMA)
    (d_local,) = torch.autograd.grad(o, local, sequence.shard(do))
    assert error(sequence.unshard(o.detach()), wanted) < 1e-10
    assert error(sequence.unshard(d_local), dx) < 1e-10


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("the ops are written for it")
def test_an_exchange_of_affine_states_refuses_another_algebra(group: dist.ProcessGroup):
    sequence = SequenceParallel(group, state_exchange="scan").sequence(37)
    tokens = Tokens(sequence.shard(torch.ones(1, 37, HEADS, V, dtype=F64)))
    if sequence.partition.layout.units == 1:  # nothing is exchanged
        return
    with pytest.raises(ValueError, match="state_exchange: got Scan, which sends affine states alone, expected 'auto'"):
        sequence.run(Maximum(), tokens, across=ACROSS_MAXIMA)
