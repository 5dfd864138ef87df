"""Sequence-parallel softmax attention against its definition, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel import SequenceParallel
from tests.parallel.inputs import F64, error, unsharded

TOLERANCE = 1e-10
SHAPES = {  # tokens, document offsets, batch
    "divisible": (48, None, 2),
    "odd": (37, None, 1),
    "shorter than the units": (3, None, 2),
    "documents": (37, (0, 2, 2, 5, 23, 37), 1),
    "a document over all ranks": (40, (0, 1, 39, 40), 1),
}
STRATEGIES = ("ring", "all_gather", "ulysses", "ulysses_ring")
HEADS, D = 12, 4  # twelve heads divide over 1, 2, 3 and 4 ranks


def definition(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, documents: tuple[int, ...] | None
) -> Tensor:
    """All scores at once."""
    tokens = q.shape[1]
    position = torch.arange(tokens)
    gap = position[:, None] - position
    seen = gap >= 0 if causal else gap == gap
    if window is not None:
        seen = seen & (gap.abs() < window)
    if documents is not None:
        document = torch.bucketize(position, torch.tensor(documents[1:]), right=True)
        seen = seen & (document[:, None] == document)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def errors(
    parallel: SequenceParallel, gen: torch.Generator, kv_heads: int, causal: bool, window: int | None
) -> dict[str, float]:
    found = {}
    for name, (tokens, documents, batch) in SHAPES.items():
        whole = [torch.randn(batch, tokens, h, D, generator=gen, dtype=F64) for h in (HEADS, kv_heads, kv_heads)]
        do = torch.randn(batch, tokens, HEADS, D, generator=gen, dtype=F64)
        leaves = [x.clone().requires_grad_() for x in whole]
        o = definition(*leaves, causal, window, documents)
        wanted = [o.detach(), *torch.autograd.grad(o, leaves, do)]

        sequence = parallel.sequence(tokens, None if documents is None else torch.tensor(documents))
        padding = ~sequence.valid
        local = []
        for x in whole:
            part = sequence.shard(x).clone()
            part[:, padding] = torch.rand_like(part[:, padding])  # must change nothing
            local.append(part.requires_grad_())
        o = sequence.softmax_attention(*local, causal=causal, window=window)
        got = [o.detach(), *torch.autograd.grad(o, local, sequence.shard(do))]
        whole = unsharded(sequence, dict(zip(("o", "dq", "dk", "dv"), got, strict=True)))
        for (what, a), b in zip(whole.items(), wanted, strict=True):
            found[f"{name}: {what}"] = error(a, b)
    return found


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("layout", "causal", "window", "kv_heads"),
    [
        ("zigzag", True, None, HEADS // 2),
        ("zigzag", True, 7, HEADS),
        ("zigzag", False, 5, HEADS // 2),
        ("contiguous", True, 7, HEADS // 2),
        ("contiguous", False, None, HEADS),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_the_definition(group: dist.ProcessGroup, gen, strategy, layout, causal, window, kv_heads):
    ranks = dist.get_world_size(group)
    if strategy == "ulysses" and kv_heads % ranks:
        kv_heads = HEADS
    found = errors(SequenceParallel(group, layout=layout, softmax=strategy), gen, kv_heads, causal, window)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank checks its own arguments")
def test_what_cannot_be_done_is_refused_on_every_rank(group: dist.ProcessGroup):
    ranks = dist.get_world_size(group)
    if ranks == 1:
        pytest.skip("nothing to split")
    x = torch.zeros(1, 4, ranks + 1, 4)
    for strategy, message in (("ulysses", "a multiple of"), ("ulysses_ring", "a factor in common")):
        sequence = SequenceParallel(group, softmax=strategy).sequence(4 * ranks)
        with pytest.raises(ValueError, match=message):
            sequence.softmax_attention(x, x, x)
    for strategy in STRATEGIES:
        sequence = SequenceParallel(group, softmax=strategy).sequence(4 * ranks)
        y = torch.zeros(1, 3 if dist.get_rank(group) == 0 else 4, 2 * ranks, 4)
        with pytest.raises(ValueError, match="tokens: got 3"):
            sequence.softmax_attention(y, y, y)
        with pytest.raises(ValueError, match="window"):
            sequence.softmax_attention(y, y, y, window=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_equals_the_definition(gen, strategy):
    found = errors(SequenceParallel(None, layout="zigzag", softmax=strategy), gen, HEADS // 2, True, None)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_half_precision_does_not_lose_by_the_exchange(group: dist.ProcessGroup, gen, strategy):
    """bf16 inputs: sums over blocks are fp32, so that many ranks err no more than 1.3 x one."""
    tokens = 64
    q, k, v = (torch.randn(1, tokens, HEADS, 16, generator=gen, dtype=F64).bfloat16() for _ in range(3))
    do = torch.randn(1, tokens, HEADS, 16, generator=gen, dtype=F64).bfloat16()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o = definition(*leaves, True, None, None)
    wanted = [o.detach(), *torch.autograd.grad(o, leaves, do.double())]

    def run(parallel: SequenceParallel) -> list[float]:
        sequence = parallel.sequence(tokens)
        local = [sequence.shard(x).requires_grad_() for x in (q, k, v)]
        o = sequence.softmax_attention(*local)
        got = [o.detach(), *torch.autograd.grad(o, local, sequence.shard(do))]
        return [error(sequence.unshard(a).double(), b) for a, b in zip(got, wanted, strict=True)]

    alone = run(SequenceParallel(None))
    together = run(SequenceParallel(group, layout="zigzag", softmax=strategy))
    assert all(b <= 1.3 * a for a, b in zip(alone, together, strict=True)), (alone, together)
