"""SequenceParallel and its per-batch sequence: shards, positions, the mean of a loss, and what they refuse."""

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import SequenceParallel
from tests.parallel.inputs import F64

LAYOUTS = ["contiguous", "zigzag"]


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unshard_inverts_shard(group: dist.ProcessGroup, gen, layout):
    parallel = SequenceParallel(group, layout=layout)
    for tokens in (1, 3, 40, 41):
        x = torch.randn(2, tokens, 3, generator=gen, dtype=F64)
        sequence = parallel.sequence(tokens)
        local = sequence.shard(x)
        shapes = [None] * parallel.size
        dist.all_gather_object(shapes, local.shape, group=group)
        assert len(set(shapes)) == 1
        assert torch.equal(sequence.unshard(local), x)
        assert torch.equal(sequence.unshard(sequence.shard(x.movedim(1, 2), dim=2), dim=-1), x.movedim(1, 2))


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_and_validity(group: dist.ProcessGroup, layout):
    offsets = torch.tensor([0, 4, 4, 11, 30], dtype=torch.int32)
    sequence = SequenceParallel(group, layout=layout).sequence(30, offsets)
    expected = torch.cat([torch.arange(n) for n in offsets.diff().tolist()])
    assert torch.equal(sequence.positions[sequence.valid], sequence.shard(expected[None])[0][sequence.valid])
    assert torch.equal(sequence.shard(torch.ones(1, 30)).bool()[0], sequence.valid)


@pytest.mark.mpi
def test_mean_is_that_of_all_ranks_and_so_is_its_gradient(group: dist.ProcessGroup):
    parallel = SequenceParallel(group)
    share = torch.full((), float(parallel.rank + 1), dtype=F64, requires_grad=True)
    loss = parallel.sequence(8).mean(share, torch.tensor(3 * parallel.rank + 1))
    loss.backward()
    ranks = parallel.size
    count = 3 * ranks * (ranks - 1) / 2 + ranks
    assert loss.item() == pytest.approx(ranks * (ranks + 1) / 2 / count, rel=1e-12)
    assert share.grad.item() == pytest.approx(1 / count, rel=1e-12)


def test_mean_of_nothing_is_zero():
    loss_sum = torch.zeros((), requires_grad=True)
    loss = SequenceParallel(None).sequence(1).mean(loss_sum, torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(loss_sum.grad)


def refusals(parallel: SequenceParallel):
    """Calls that every rank must refuse, with what the message must name; only the last rank's argument is wrong."""
    wrong = parallel.rank == parallel.size - 1
    sequence = parallel.sequence(10)
    local = len(sequence.positions)

    def rows(*shape: int, tokens: int = local) -> torch.Tensor:
        return torch.zeros(1, tokens, *shape, dtype=F64)

    short = local + 1 if wrong else local
    heads = 5 if wrong else 4
    gate = rows(2) + (0.5 if wrong else -0.5)
    dtype = torch.float32 if wrong else F64
    q, v = rows(2, 3), rows(2, 4)
    yield "tokens: got", lambda: sequence.linear_attention(*(rows(2, 3, tokens=short) for _ in range(3)))
    yield "expected natural logarithms, at most 0", lambda: sequence.linear_attention(q, q, v, gate)
    yield "different ranks", lambda: sequence.linear_attention(*(x.to(dtype) for x in (q, q, v)))
    yield "a multiple of q's", lambda: sequence.linear_attention(q, q, rows(5 if wrong else 2, 4))
    yield "beta", lambda: sequence.delta_rule(q, q, v, rows(3 if wrong else 2))
    yield "tokens: got", lambda: sequence.softmax_attention(*(rows(4, 3, tokens=short) for _ in range(3)))
    yield "a multiple of k's", lambda: sequence.softmax_attention(rows(heads, 3), rows(2, 3), rows(2, 3))
    yield "window", lambda: sequence.softmax_attention(q, q, q, window=0 if wrong else 1)
    yield "weight", lambda: sequence.causal_conv1d(rows(3), torch.zeros(2 if wrong else 3, 4, dtype=F64))
    yield (
        "initial_state",
        lambda: sequence.linear_attention(q, q, v, initial_state=torch.zeros(2 if wrong else 1, 2, 3, 4, dtype=F64)),
    )
    yield "tokens: got 0", lambda: parallel.sequence(0 if wrong else 1)
    yield "expected 9", lambda: parallel.sequence(9, torch.tensor([0, 10 if wrong else 9]))
    yield "do not decrease", lambda: parallel.sequence(9, torch.tensor([0, 5, 3 if wrong else 6, 9]))


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank checks its own arguments")
def test_every_rank_refuses_what_one_refuses(group: dist.ProcessGroup):
    check_refusals(SequenceParallel(group))


def test_one_rank_refuses():
    check_refusals(SequenceParallel(None))


def check_refusals(parallel: SequenceParallel):
    for message, call in refusals(parallel):
        if message != "different ranks" or parallel.size > 1:
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_ranks_with_different_lengths_are_told(group: dist.ProcessGroup):
    parallel = SequenceParallel(group)
    if parallel.size > 1:
        with pytest.raises(ValueError, match="different ranks"):
            parallel.sequence(10 + parallel.rank)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_ulysses_refuses_heads_that_it_cannot_split(group: dist.ProcessGroup):
    parallel = SequenceParallel(group, softmax="ulysses")
    sequence = parallel.sequence(16)
    q = torch.zeros(1, len(sequence.positions), 2 * parallel.size, 3)
    if parallel.size > 1:
        with pytest.raises(ValueError, match="ulysses"):
            sequence.softmax_attention(q, q[:, :, :1], q[:, :, :1])


def test_unknown_names():
    with pytest.raises(ValueError, match="layout.*'striped'"):
        SequenceParallel(None, layout="striped")
    with pytest.raises(ValueError, match="state_exchange.*'pigeon'"):
        SequenceParallel(None, state_exchange="pigeon")
    with pytest.raises(ValueError, match="softmax.*'spiral'"):
        SequenceParallel(None, softmax="spiral")


def test_packed_documents_want_one_row():
    sequence = SequenceParallel(None).sequence(8, torch.tensor([0, 3, 8]))
    x = torch.zeros(2, 8, 1, 2)
    with pytest.raises(ValueError, match="batch.*1 for packed"):
        sequence.linear_attention(x, x, x)
