"""Log-linear attention cut into units, with a thread for each rank: slots, wherever units begin in their documents."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lasp.kernels.fenwick import resized
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import run
from lasp.kernels.reference.log_linear import LogLinearOp
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from lasp.kernels.segments import Segments
from lasp.parallel import log_linear
from lasp.parallel.layout import PADDING, Layout, Partition
from tests.kernels.log_linear import Drawn, draw, log_linear_inputs_of, results
from tests.parallel.inputs import error
from tests.patience import PATIENCE

PACKED = (0, 3, 40, 41, 41, 110, 150)
CASES = [
    (150, None, None),
    (150, PACKED, None),
    (3, None, None),
    (9, (0, 3, 6, 9), None),
    (77, None, [13]),
    (150, PACKED, [5, 64, 0, 9, 40, 1]),
    (64, None, None),
    (64, (0, 62, 64), [19, 0]),
]


class Threads:
    """Messages between the ranks of one process."""

    def __init__(self, ranks: int):
        self.ranks, self.barrier, self.sent = ranks, threading.Barrier(ranks, timeout=PATIENCE), {}
        self.sizes: list[int] = []  # of rank 0's messages

    def all_gather(self, x: Tensor, rank: int) -> Pending[Tensor]:
        self.sent[rank] = x
        if rank == 0:
            self.sizes.append(x.numel())
        self.barrier.wait()
        gathered = torch.stack([self.sent[r] for r in range(self.ranks)])
        self.barrier.wait()
        return Pending(lambda: gathered)

    def reduce_scatter(self, x: Tensor, rank: int) -> Pending[Tensor]:
        return self.all_gather(x, rank).then(lambda gathered: gathered[:, rank].sum(0))

    def all_reduce(self, x: Tensor, rank: int) -> Pending[Tensor]:
        return self.all_gather(x, rank).then(lambda gathered: gathered.sum(0))


def of_rank(partition: Partition, drawn: Drawn, upstream: dict, seen: tuple[int, ...]) -> dict[str, Tensor]:
    """What one rank finds."""

    def shard(x):
        padded = torch.cat([x, x.new_zeros(1, partition.layout.units * partition.unit_length, *x.shape[2:])], 1)
        return torch.cat([padded[:, a:b] for a, b in partition.ranges], 1)

    leaves = {name: shard(x).requires_grad_() for name, x in drawn.tensors.items()}
    inputs, slots = list(leaves.values()), None
    if drawn.state is not None:
        slots = drawn.state.slots.clone().requires_grad_()
        inputs.append(slots)
    lengths = torch.tensor([0, *map(len, partition.local)])
    before = tuple(f.position + (0 if f.document == PADDING else seen[f.document]) for f in partition.local)
    segments = Segments(1, partition.local_tokens, lengths.cumsum(0))
    x = log_linear_inputs_of(leaves, scale=0.4, segments=segments, seen=before)
    boundary = log_linear.AcrossSlots(partition, 1, partition.rank, seen, *(range(partition.documents),) * 2)
    as_many = None if slots is None else resized(slots, boundary.slots)
    o, final = run(log_linear.Between(LogLinearOp()), boundary, x, as_many, True)
    grads = torch.autograd.grad([o, final], inputs, [shard(upstream["o"]), upstream["final"]])
    found = {"o": o, "final": final} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=False)}
    return found if slots is None else found | {"dslots": grads[-1]}


def of_all(layout: Layout, offsets, drawn: Drawn, upstream: dict, monkeypatch, messages=None) -> dict[str, Tensor]:
    """The same of all ranks, made whole."""
    messages = messages or Threads(layout.ranks)
    functions = {name: getattr(messages, name) for name in ("all_gather", "all_reduce", "reduce_scatter")}
    monkeypatch.setattr(log_linear, "comm", SimpleNamespace(**functions))
    seen = (0,) * (len(offsets) - 1) if drawn.state is None else tuple(drawn.state.tokens.tolist())
    partitions = [Partition(layout, rank, list(offsets), aligned=True) for rank in range(layout.ranks)]
    with ThreadPoolExecutor(layout.ranks) as threads:
        found = list(threads.map(lambda partition: of_rank(partition, drawn, upstream, seen), partitions))
    whole = {}
    for name, first in found[0].items():
        whole[name] = first
        if name not in ("final", "dslots"):
            units = torch.cat([of[name] for of in found], 1).unflatten(1, (layout.units, -1))[:, layout.rank_order]
            whole[name] = units.flatten(1, 2)[:, : offsets[-1]]
        else:
            assert all(torch.equal(of[name], first) for of in found)
    return {name: x.detach() for name, x in whole.items()}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
def test_units_equal_the_whole(gen, layout, delta, monkeypatch):
    for tokens, offsets, seen in CASES:
        drawn, upstream = draw(gen, tokens, delta=delta, offsets=offsets, seen=seen, levels=9), {}
        wanted = results(gen, log_linear_recurrent, drawn, upstream, final=True, scale=0.4)
        for ranks in (1, 2, 3, 4):
            got = of_all(Layout(layout, ranks), offsets or (0, tokens), drawn, upstream, monkeypatch)
            found = {name: error(got[name], wanted[name]) for name in wanted}
            assert max(found.values()) < 1e-10, (ranks, tokens, offsets, seen, found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
def test_what_is_sent_for_aligned_units(gen, layout, delta, monkeypatch):
    """Forward one state a unit. Backward one for each bit of a unit's number that is 1, or for scalar gates one for
    every unit of all, of which each rank gets its own, and numbers that are few."""
    ranks, heads, key_dim, value_dim = 4, 2, 6, 4
    drawn, upstream = draw(gen, 64, delta=delta, levels=9), {}
    results(gen, log_linear_recurrent, drawn, upstream, final=True)
    messages, made = Threads(ranks), Layout(layout, ranks)
    of_all(made, (0, 64), drawn, upstream, monkeypatch, messages)
    units, state = made.units_per_rank, heads * key_dim * value_dim
    transition = heads * key_dim**2 if delta else heads
    bits = max(sum(unit.bit_count() for unit in made.owned(rank)) for rank in range(ranks))
    assert bits == {"contiguous": 2, "zigzag": 3}[layout]
    backward = [bits * state] if delta else [ranks * units * state, bits * heads]
    final = 7 * state
    assert messages.sizes == [units * (state + transition), final, *backward]
