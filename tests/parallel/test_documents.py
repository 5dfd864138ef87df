"""Documents that are cut into units one by one: every op equals one rank's, and so does every gradient."""

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import SequenceParallel
from lasp.parallel.documents import DocumentSequence
from tests.parallel.inputs import generator

TOLERANCE = 1e-10
HEADS, KEY, VALUE, WIDTH = 2, 6, 5, 4
LENGTHS = (5, 0, 3, 8)  # tokens per unit


def offsets(parallel: SequenceParallel) -> torch.Tensor:
    lengths = torch.tensor([0, *LENGTHS]) * parallel.layout.units
    return lengths.cumsum(0).to(torch.int32)


def draw(gen: torch.Generator, tokens: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, generator=gen, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    return {
        "q": normal(HEADS, KEY),
        "k": unit(normal(HEADS, KEY), dim=-1),
        "v": normal(HEADS, VALUE),
        "beta": 0.1 * torch.rand(1, tokens, HEADS, generator=gen, dtype=torch.float64),
        "decay": -0.1 * torch.rand(1, tokens, HEADS, KEY, generator=gen, dtype=torch.float64),
        "x": normal(7),
    }


def linear(seq, t, weight):
    return seq.linear_attention(t["q"], t["k"], t["v"], t["decay"])[0]


def not_causal(seq, t, weight):
    return seq.linear_attention(t["q"], t["k"], t["v"], causal=False)[0]


def delta(seq, t, weight):
    return seq.delta_rule(t["q"], t["k"], t["v"], t["beta"], t["decay"])[0]


def softmax(seq, t, weight):
    return seq.softmax_attention(t["q"], t["k"], t["v"])


def convolution(seq, t, weight):
    return seq.causal_conv1d(t["x"], weight)


@pytest.mark.mpi
@pytest.mark.parametrize("op", [linear, not_causal, delta, softmax, convolution])
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_op_equals_one_rank(gen, group, layout, op):
    parallel = SequenceParallel(group, layout=layout)
    cu_seqlens = offsets(parallel)
    tokens = int(cu_seqlens[-1])
    whole = draw(gen, tokens)
    weight = torch.randn(7, WIDTH, generator=gen, dtype=torch.float64, requires_grad=True)
    seq = DocumentSequence(parallel, cu_seqlens)
    one = SequenceParallel(None).sequence(tokens, cu_seqlens)
    results = []
    for sequence, tensors in ((one, whole), (seq, {name: seq.shard(x) for name, x in whole.items()})):
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        o = op(sequence, leaves, weight)
        d = torch.randn(1, tokens, *o.shape[2:], generator=generator(5), dtype=o.dtype)
        grads = torch.autograd.grad(o, [*leaves.values(), weight], sequence.shard(d), allow_unused=True)
        results.append((o.detach(), dict(zip([*leaves, "weight"], grads, strict=True))))
    (wanted, wanted_grads), (got, got_grads) = results
    torch.testing.assert_close(seq.unshard(got), wanted, rtol=0, atol=TOLERANCE)
    for name, grad in wanted_grads.items():
        if grad is None:
            assert got_grads[name] is None
            continue
        mine = got_grads[name]
        if name == "weight":
            dist.all_reduce(mine, group=group)
        else:
            mine = seq.unshard(mine)
        torch.testing.assert_close(mine, grad, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_positions_and_shards(group):
    parallel = SequenceParallel(group, layout="zigzag")
    cu_seqlens = offsets(parallel)
    seq = DocumentSequence(parallel, cu_seqlens)
    tokens = int(cu_seqlens[-1])
    everything = torch.arange(tokens)
    within = torch.cat([torch.arange(length * parallel.layout.units) for length in LENGTHS])
    assert torch.equal(seq.positions, seq.shard(within, dim=0))
    assert seq.valid.all()
    x = everything[:, None].double().requires_grad_()
    back = seq.unshard(seq.shard(x, dim=0), dim=0)
    assert torch.equal(back, x)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_bad_documents(group):
    parallel = SequenceParallel(group, layout="zigzag")
    units = parallel.layout.units
    with pytest.raises(ValueError, match="document length: got .* a multiple of the"):
        DocumentSequence(parallel, torch.tensor([0, units + 1]))
    with pytest.raises(ValueError, match="decrease"):
        DocumentSequence(parallel, torch.tensor([0, 2 * units, units]))
    for softmax in ("ulysses", "ulysses_ring"):
        seq = DocumentSequence(SequenceParallel(group, layout="zigzag", softmax=softmax), torch.tensor([0, units]))
        q = torch.zeros(1, units // parallel.size, parallel.size, 4)
        with pytest.raises(ValueError, match=f"got '{softmax}', expected another strategy"):
            seq.softmax_attention(q, q, q)
    seq = DocumentSequence(parallel, torch.tensor([0, units]))
    x = torch.zeros(1, units // parallel.size, 3)
    with pytest.raises(ValueError, match="a document's tokens per unit: got 1, expected at least 3"):
        seq.causal_conv1d(x, torch.zeros(3, 4))
