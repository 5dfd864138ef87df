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


@pytest.mark.mpi
def test_counts_may_be_weights(group: dist.ProcessGroup):
    """Also such as add up to less than one."""
    parallel = SequenceParallel(group)
    total = torch.tensor(0.5, dtype=F64, requires_grad=True)
    loss = parallel.sequence(8).mean(total, torch.tensor(0.125 / parallel.size))
    loss.backward()
    assert (loss.item(), total.grad.item()) == pytest.approx((4 * parallel.size, 8), rel=1e-7)


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
    q, v, beta, state = rows(2, 3), rows(2, 4), rows(2), torch.zeros(1, 2, 3, 4, dtype=F64)
    x, weight, one = rows(3), torch.zeros(3, 4, dtype=F64), torch.ones(())
    linear, delta, softmax = sequence.linear_attention, sequence.delta_rule, sequence.softmax_attention
    yield "tokens: got", lambda: linear(*(rows(2, 3, tokens=short) for _ in range(3)))
    yield "expected natural logarithms, at most 0", lambda: linear(q, q, v, gate)
    yield "a multiple of q's", lambda: linear(q, q, rows(5 if wrong else 2, 4))
    yield "beta", lambda: delta(q, q, v, rows(3 if wrong else 2))
    yield "tokens: got", lambda: softmax(*(rows(4, 3, tokens=short) for _ in range(3)))
    yield "a multiple of k's", lambda: softmax(rows(heads, 3), rows(2, 3), rows(2, 3))
    yield "window", lambda: softmax(q, q, q, window=0 if wrong else 1)
    yield "weight", lambda: sequence.causal_conv1d(x, torch.zeros(2 if wrong else 3, 4, dtype=F64))
    yield "initial_state", lambda: linear(q, q, v, initial_state=torch.zeros(2 if wrong else 1, 2, 3, 4, dtype=F64))
    yield "tokens: got 0", lambda: parallel.sequence(0 if wrong else 1)
    yield "expected 9", lambda: parallel.sequence(9, torch.tensor([0, 10 if wrong else 9]))
    yield "do not decrease", lambda: parallel.sequence(9, torch.tensor([0, 5, 3 if wrong else 6, 9]))
    yield "local: got", lambda: sequence.unshard(rows(2, tokens=short))
    yield "dim: got 7", lambda: sequence.unshard(x, dim=7 if wrong else 1)
    yield "loss_sum: got shape", lambda: sequence.mean(torch.ones(2) if wrong else one, one)
    yield "loss_sum: got dtype torch.int64", lambda: sequence.mean(torch.tensor(1) if wrong else one, one)
    yield "count: got shape", lambda: sequence.mean(one, torch.ones(2) if wrong else one)
    for nothing in (None, 3.0, [1.0], "text"):  # in the place of a tensor

        def or_nothing(right: object, nothing: object = nothing) -> object:
            return nothing if wrong else right

        yield "q: got", lambda other=or_nothing: linear(other(q), q, v)
        yield "k: got", lambda other=or_nothing: linear(q, other(q), v)
        yield "v: got", lambda other=or_nothing: softmax(q, q, other(q))
        yield "beta: got", lambda other=or_nothing: delta(q, q, v, other(beta))
        yield "weight: got", lambda other=or_nothing: sequence.causal_conv1d(x, other(weight))
        yield "local: got", lambda other=or_nothing: sequence.unshard(other(x))
        yield "loss_sum: got", lambda other=or_nothing: sequence.mean(other(one), one)
        yield "x: got", lambda other=or_nothing: sequence.sum(other(x))
        if nothing != 3.0:
            yield "count: got", lambda other=or_nothing: sequence.mean(one, other(one))
            yield "tokens: got", lambda other=or_nothing: parallel.sequence(other(10))
        if nothing is not None:
            yield "decay: got", lambda other=or_nothing: linear(q, q, v, other(None))
            yield "initial_state: got", lambda other=or_nothing: delta(q, q, v, beta, initial_state=other(state))
            yield "cu_seqlens: got", lambda other=or_nothing: parallel.sequence(10, other(None))
        if nothing not in (None, 3.0):
            yield "scale: got", lambda other=or_nothing: softmax(q, q, q, scale=other(1.0))
            yield "window: got", lambda other=or_nothing: softmax(q, q, q, window=other(1))


def differences(parallel: SequenceParallel):
    """Calls that would do on one rank, with what the last of several ranks does otherwise than the others."""
    other = parallel.rank == parallel.size - 1
    sequence, longer = parallel.sequence(10), parallel.sequence(10, torch.tensor([0, 3, 10]))
    tokens = len(sequence.positions)
    q, x = torch.zeros(1, tokens, 2, 4, dtype=F64), torch.zeros(1, tokens, 3, dtype=F64)
    one, gate, state = torch.ones(()), torch.zeros(1, tokens, 2, dtype=F64), torch.zeros(1, 2, 4, 4, dtype=F64)
    weight = torch.zeros(3, 4, dtype=F64)
    linear, softmax, conv = sequence.linear_attention, sequence.softmax_attention, sequence.causal_conv1d

    def single(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.float() if other else x for x in tensors]

    def wanted(x: torch.Tensor) -> torch.Tensor:
        return x.clone().requires_grad_() if other else x

    yield "q: rank 0: .*float64.*float32", lambda: linear(*single(q, q, q))
    yield "output_final_state: rank 0: False", lambda: linear(q, q, q, output_final_state=other)
    yield "causal: rank 0: False", lambda: linear(q, q, q, causal=other)
    yield "scale: rank 0: 0.5", lambda: linear(q, q, q, scale=1.0 if other else None)
    yield "decay: rank 0: None", lambda: linear(q, q, q, gate if other else None)
    yield "initial_state: rank 0: None", lambda: linear(q, q, q, initial_state=state if other else None)
    yield "gradient of any input: rank 0: False", lambda: linear(q, q, wanted(q))
    yield "gradient of initial_state: rank 0: False", lambda: linear(wanted(q), q, q, initial_state=wanted(state))
    yield "gradient of any input: rank 0: False", lambda: softmax(q, wanted(q), q)
    yield "causal: rank 0: False", lambda: softmax(q, q, q, causal=other)
    yield "window: rank 0: 2", lambda: softmax(q, q, q, window=None if other else 2)
    yield "k: rank 0: .*2, 4.*1, 4", lambda: softmax(q, *(q[:, :, : 1 if other else 2] for _ in range(2)))
    yield "weight: rank 0: .*3, 4.*3, 2", lambda: conv(x, weight[:, 2:] if other else weight)
    yield "bias: rank 0: None", lambda: conv(x, weight, weight[:, 0] if other else None)
    yield "gradient of any input: rank 0: False", lambda: conv(wanted(x), weight)
    yield "dim: rank 0: 1", lambda: sequence.unshard(x.expand(tokens, tokens, 3), dim=0 if other else 1)
    yield "x: rank 0: .*float64.*float32", lambda: sequence.sum(*single(x))
    yield "loss_sum: rank 0: torch.float64", lambda: sequence.mean(*single(one.double()), one)
    yield "sequence: rank 0: '10 tokens, 1 ", lambda: (longer if other else sequence).sum(x)
    yield "call: rank 0: sum", lambda: sequence.unshard(x) if other else sequence.sum(x)
    yield "tokens: rank 0: 9", lambda: parallel.sequence(10 if other else 9)
    yield "aligned: rank 0: False", lambda: parallel.sequence(10, aligned=other)
    for option, values in (("layout", ("contiguous", "zigzag")), ("state_exchange", ("ring", "all_gather"))):
        choice = {option: values[other]}
        yield f"{option}: rank 0: .*{values[0]}", lambda choice=choice: SequenceParallel(parallel.group, **choice)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank checks its own arguments")
def test_every_rank_refuses_what_one_refuses(group: dist.ProcessGroup):
    parallel = SequenceParallel(group)
    check_refusals(parallel, rf"rank {parallel.size - 1}: .*" if parallel.size > 1 else "")


def test_one_rank_refuses():
    check_refusals(SequenceParallel(None), "")


def check_refusals(parallel: SequenceParallel, who: str):
    for message, call in refusals(parallel):
        with pytest.raises(ValueError, match=who + message):
            call()


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank checks its own arguments")
def test_ranks_that_call_otherwise_than_others_are_told(group: dist.ProcessGroup):
    parallel = SequenceParallel(group)
    for message, call in differences(parallel):
        if parallel.size == 1:
            call()
        else:
            with pytest.raises(ValueError, match=f"different ranks, .*{message}"):
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
