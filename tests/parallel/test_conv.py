"""Sequence-parallel causal convolution: halos over units of any length, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import causal_conv1d
from lasp.parallel import SequenceParallel
from tests.parallel.inputs import F64, error

TOLERANCE = 1e-10
CHANNELS = 3
SHAPES = {  # tokens, document offsets, batch
    "divisible": (48, None, 2),
    "odd": (37, None, 1),
    "units shorter than the width": (9, None, 2),
    "no sequences": (37, None, 0),
    "documents": (37, (0, 2, 2, 5, 23, 37), 1),
    "short documents": (10, (0, 1, 9, 10), 1),
}


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, documents: tuple[int, ...] | None) -> Tensor:
    """Token by token."""
    width, rows = weight.shape[1], []
    starts = documents or (0, x.shape[1])
    for t in range(x.shape[1]):
        start = max(s for s in starts[:-1] if s <= t)
        taps = [weight[:, width - 1 - back] * x[:, t - back] for back in range(min(width, t - start + 1))]
        rows.append(sum(taps[1:], taps[0]) + (0 if bias is None else bias))
    return torch.stack(rows, 1)


def errors(parallel: SequenceParallel, gen: torch.Generator, width: int, biased: bool) -> dict[str, float]:
    found = {}
    for name, (tokens, documents, batch) in SHAPES.items():
        x, dy = (torch.randn(batch, tokens, CHANNELS, generator=gen, dtype=F64) for _ in range(2))
        weight = torch.randn(CHANNELS, width, generator=gen, dtype=F64, requires_grad=True)
        bias = torch.randn(CHANNELS, generator=gen, dtype=F64, requires_grad=True) if biased else None
        parameters = [p for p in (weight, bias) if p is not None]
        whole = x.clone().requires_grad_()
        y = definition(whole, weight, bias, documents)
        wanted = [y.detach(), *torch.autograd.grad(y, [whole, *parameters], dy)]

        sequence = parallel.sequence(tokens, None if documents is None else torch.tensor(documents))
        local = sequence.shard(x).clone()
        local[:, ~sequence.valid] = 1.0  # padding must change nothing
        local.requires_grad_()
        y = sequence.causal_conv1d(local, weight, bias)
        dx, *parts = torch.autograd.grad(y, [local, *parameters], sequence.shard(dy))
        for part in parts:  # a parameter's gradient is this rank's part of a sum
            if parallel.group is not None:
                dist.all_reduce(part, group=parallel.group)
        got = [sequence.unshard(y.detach()), sequence.unshard(dx), *parts]
        for what, a, b in zip(("y", "dx", "dweight", "dbias"), got, wanted, strict=False):
            found[f"{name}: {what}"] = error(a, b)
    return found


@pytest.mark.mpi
@pytest.mark.parametrize(("width", "biased"), [(2, False), (4, True)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_equals_the_definition(group: dist.ProcessGroup, gen, layout, width, biased):
    found = errors(SequenceParallel(group, layout=layout), gen, width, biased)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.parametrize(("width", "biased"), [(1, True), (2, False), (4, True), (6, False)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank_equals_the_definition(gen, layout, width, biased):
    found = errors(SequenceParallel(None, layout=layout), gen, width, biased)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


def test_initial_tail_continues_a_sequence(gen):
    x = torch.randn(2, 20, CHANNELS, generator=gen, dtype=F64)
    weight = torch.randn(CHANNELS, 4, generator=gen, dtype=F64)
    whole = causal_conv1d(x, weight)
    rest = causal_conv1d(x[:, 8:], weight, initial_tail=x[:, 5:8])
    assert error(rest, whole[:, 8:]) < TOLERANCE
