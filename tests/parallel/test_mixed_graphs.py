"""Several calls in one graph of autograd: what ranks do in backward is the same on all of them, or refused on all."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.reference.chunk import ChunkedOp
from lasp.parallel import SequenceParallel, Stream
from lasp.parallel.boundary import AcrossDocuments, AcrossUnits
from tests.parallel.inputs import F64, draw, error


def of_several_calls(parallel: SequenceParallel, case, short: int) -> list[Tensor]:
    """A loss and the gradients of whole tensors. Two operations share inputs, a final state goes on into another
    sequence, parts are recomputed, one in the other, and backward comes twice over some and not at all over others."""
    tokens = case.v.shape[1]
    first, second = parallel.sequence(tokens, case.cu_seqlens), parallel.sequence(short)
    whole = {name: x.clone().requires_grad_() for name, x in case.per_token.items()}
    weight = torch.linspace(-1, 1, 8, dtype=F64).view(4, 2).requires_grad_()

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return first.softmax_attention(q.tile(2, 1), k.tile(2, 1), v) + checkpoint(convolved, v, use_reentrant=False)

    def convolved(v: Tensor) -> Tensor:
        return first.causal_conv1d(v.flatten(2), weight.tile(2, 1)).view_as(v)

    x = {name: first.shard(each) for name, each in whole.items()}
    o, state = first.linear_attention(x["q"], x["k"], x["v"], x["decay"], output_final_state=True)
    unused, _ = first.linear_attention(o.detach(), x["v"], x["v"])
    o = o + checkpoint(attended, x["q"], x["k"], x["v"], use_reentrant=False)
    with torch.no_grad():
        second.softmax_attention(*(second.shard(each[:, :short]).float() for each in (case.v,) * 3))
    y = {name: second.shard(each[:, :short]) for name, each in whole.items()}
    p, _ = second.delta_rule(y["q"], y["k"], y["v"], y["beta"], initial_state=state[-1:])
    weights = first.shard(case.do), second.shard(case.do[:, :short])
    losses = [s.mean((z * w).sum(), s.valid.sum()) for s, z, w in zip((first, second), (o, p), weights, strict=True)]
    leaves = [*whole.values(), weight]
    one = torch.autograd.grad(losses[1], leaves[:-1], retain_graph=True)
    both = torch.autograd.grad(sum(losses), leaves)
    of_all_ranks = [first.sum(d) for d in (*one, *both)]
    assert unused.requires_grad
    return [losses[0].detach(), losses[1].detach(), *of_all_ranks]


@pytest.mark.mpi
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, (0, 2, 15, 37)])
def test_several_calls_in_one_graph(group: dist.ProcessGroup, gen: torch.Generator, layout: str, documents):
    case = draw(gen, "gated delta", 37, documents)
    wanted = of_several_calls(SequenceParallel(None), case, 5)
    for exchange in ("all_gather", "scan"):
        found = of_several_calls(SequenceParallel(group, layout=layout, state_exchange=exchange), case, 5)
        assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-10


def differences(parallel: SequenceParallel):
    """What the last of several ranks does otherwise than the others, and what all are told."""
    other = parallel.rank == parallel.size - 1
    sequence, stream = parallel.sequence(10), Stream(parallel, 40, 20)
    x = torch.ones(1, len(sequence.positions), parallel.size, 4, dtype=F64, requires_grad=True)
    long = torch.ones(1, len(stream[0].positions), 3, dtype=F64, requires_grad=True)
    weight = torch.ones(3, 2, dtype=F64)

    def linear(v: Tensor, **options):
        return sequence.linear_attention(x, x, v, **options)

    def convolved() -> Tensor:
        return stream[0].convolve(long, weight)[0]

    for call in (
        lambda: linear(x)[0],
        lambda: sequence.softmax_attention(x, x, x),
        lambda: sequence.causal_conv1d(x.flatten(2), torch.ones(parallel.size * 4, 2, dtype=F64)),
        convolved,
    ):

        def one_or_the_other(call=call) -> None:
            both = [call().sum(), call().sum()]
            both[other].backward()

        def order(call=call) -> None:
            both = [call().sum(), call().sum()]
            for loss in both if other else both[::-1]:
                loss.backward()

        def nothing(call=call) -> None:
            made = call()
            if not other:
                made.sum().backward()
            sequence.sum(weight)

        yield "number of the call: rank 0: ", one_or_the_other
        yield "number of the call: rank 0: ", order
        yield "call: rank 0: backward of .*: sum", nothing

    def final_state() -> None:
        o, state = linear(x, output_final_state=True)
        (o.sum() + state.sum() * 2 if other else o.sum()).backward()

    yield "gradient of final_state: rank 0: False", final_state


def others(parallel: SequenceParallel):
    """Likewise, with what is given to them: sequences that differ in how they are made, or what lies between ranks."""
    other, group = parallel.rank == parallel.size - 1, parallel.group
    alike = [SequenceParallel(group), SequenceParallel(group, state_exchange="ring")]
    cut = [Stream(parallel, tokens, 20)[0] for tokens in (20, 40)]
    x = torch.ones(1, len(parallel.sequence(20).positions), 2, 3, dtype=F64)
    weight = torch.ones(6, 2, dtype=F64)
    yield "sequence: rank 0: .*ring", lambda: alike[other].sequence(20).linear_attention(x, x, x)
    yield "sequence: rank 0: .*goes on", lambda: cut[other].causal_conv1d(x.flatten(2), weight)
    across = [AcrossUnits, AcrossDocuments][other]
    run = parallel.sequence(20).run
    yield "across: rank 0: 'AcrossUnits'", lambda: run(ChunkedOp(), LinearInputs(x, x, x, scale=1.0), across=across)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank goes its own way")
@pytest.mark.parametrize("kind", [differences, others])
def test_ranks_that_go_other_ways_are_told(group: dist.ProcessGroup, kind):
    parallel = SequenceParallel(group)
    for message, call in kind(parallel):
        if parallel.size == 1:
            call()
        else:
            with pytest.raises(ValueError, match=f"different ranks, .*{message}"):
                call()
