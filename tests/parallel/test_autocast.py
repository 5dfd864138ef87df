"""torch.autocast chooses inputs' dtypes and touches nothing else: the bits of calls with inputs cast by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.kernels import causal_conv1d, delta_rule, linear_attention, softmax_attention
from lasp.models import Decoder, tiny
from lasp.parallel import Sequence, SequenceParallel
from tests.parallel.inputs import error

HALF = torch.bfloat16
TOKENS = 21  # there is padding on two ranks and more
OPS: dict[str, Callable[[Sequence, dict[str, Tensor]], tuple]] = {
    "linear": lambda seq, x: seq.linear_attention(x["q"], x["k"], x["v"], **final(x)),
    "not causal": lambda seq, x: seq.linear_attention(x["q"], x["k"], x["v"], causal=False, **final(x)),
    "scalar": lambda seq, x: seq.linear_attention(x["q"], x["k"], x["v"], -x["gate"], **final(x)),
    "diagonal": lambda seq, x: seq.linear_attention(x["q"], x["k"], x["v"], -x["gates"], **final(x)),
    "delta": lambda seq, x: seq.delta_rule(x["q"], x["k"], x["v"], x["beta"], **final(x)),
    "gated delta": lambda seq, x: seq.delta_rule(x["q"], x["k"], x["v"], x["beta"], -x["gate"], **final(x)),
    "diagonal delta": lambda seq, x: seq.delta_rule(x["q"], x["k"], x["v"], x["beta"], -x["gates"], **final(x)),
    "softmax": lambda seq, x: (seq.softmax_attention(x["q"], x["k"], x["v"]),),
    "convolution": lambda seq, x: (seq.causal_conv1d(x["x"], x["weight"]),),
    "mean": lambda seq, x: (seq.mean(x["x"].square().sum(), torch.tensor(3)),),
}
DTYPES = {  # of q, k, v and of the convolution's input
    "float64": (torch.float64,) * 3,
    "float32": (torch.float32,) * 3,
    "bfloat16": (HALF,) * 3,
    "mixed": (HALF, torch.float32, HALF),
}
HEADS, D = 12, 4  # twelve heads divide over 1, 2, 3 and 4 ranks
WAYS = [  # layout, state exchange, softmax
    ("zigzag", "ring", "ring"),
    ("contiguous", "all_gather", "all_gather"),
    ("zigzag", "symmetric_memory", "ulysses"),
]


def final(x: dict[str, Tensor]) -> dict:
    return {"initial_state": x["state"], "output_final_state": True}


def draw(gen: torch.Generator, dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    """Of a whole sequence, but for the state and the weight; gates and the state in what is at least float32."""
    wide = torch.promote_types(dtypes[1], torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    q, k, v = (normal(1, TOKENS, HEADS, D).to(dtype) for dtype in dtypes)
    gates = torch.rand(1, TOKENS, HEADS, D, generator=gen).to(wide) / 8
    return {
        "q": q,
        "k": (k / k.norm(dim=-1, keepdim=True)).to(k.dtype),
        "v": v,
        "gates": gates,
        "gate": gates[..., 0],
        "beta": gates[..., 1],
        "x": normal(1, TOKENS, 3).to(dtypes[2]),
        "state": normal(1, HEADS, D, D).to(wide),
        "weight": normal(3, 4).to(wide),
    }


def by_hand(op: str, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Softmax attention's inputs in half precision, as scaled_dot_product_attention's, and others' if they differ."""
    given = {name: x[name] for name in ("q", "k", "v")}
    if op == "softmax" or len({y.dtype for y in given.values()}) > 1:
        given = {name: y if y.dtype == torch.float64 else y.to(HALF) for name, y in given.items()}
    return x | given


def results(seq: Sequence, op: str, tensors: dict[str, Tensor], autocast: bool) -> list[Tensor]:
    """What an op returns, and all gradients, when it is recomputed and everything happens under autocast."""
    whole = {"state", "weight"}
    leaves = {name: x if name in whole else seq.shard(x) for name, x in tensors.items()}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    with torch.autocast("cpu", HALF, enabled=autocast):
        given = leaves if autocast else by_hand(op, leaves)
        outputs = checkpoint(lambda: OPS[op](seq, given), use_reentrant=False)
        total = sum(o.double().square().sum() for o in outputs)
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def compare(parallel: SequenceParallel, gen: torch.Generator, op: str) -> None:
    for name, dtypes in DTYPES.items():
        tensors, seq = draw(gen, dtypes), parallel.sequence(TOKENS)
        got = results(seq, op, tensors, autocast=True)
        wanted = results(seq, op, tensors, autocast=False)
        assert [x.dtype for x in got] == [x.dtype for x in wanted], name
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), name
        if op not in ("softmax", "convolution", "mean"):
            assert got[1].dtype == torch.promote_types(dtypes[1], torch.float32)
        # And ranks together compute what one does, to the precision of the outputs.
        alone = OPS[op](SequenceParallel(None).sequence(TOKENS), by_hand(op, tensors))[0]
        whole = got[0] * parallel.size if op == "mean" else seq.unshard(got[0].detach())
        precision = max(torch.finfo(x.dtype).eps for x in (alone, tensors["x"]))
        assert error(whole.double(), alone.double()) < 8 * precision, name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank(gen: torch.Generator, layout: str, op: str):
    compare(SequenceParallel(None, layout=layout), gen, op)


@pytest.mark.parametrize("name", DTYPES)
def test_functions_of_one_device(gen: torch.Generator, name: str):
    x = draw(gen, DTYPES[name])
    for op, function in {
        "gated delta": lambda x: delta_rule(x["q"], x["k"], x["v"], x["beta"], -x["gate"], **final(x)),
        "not causal": lambda x: linear_attention(x["q"], x["k"], x["v"], causal=False, **final(x)),
        "softmax": lambda x: softmax_attention(x["q"], x["k"], x["v"]),
        "convolution": lambda x: (causal_conv1d(x["x"], x["weight"]),),
    }.items():
        with torch.autocast("cpu", HALF):
            got = function(x)
        for a, b in zip(got, function(by_hand(op, x)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), op


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.ranks(2, 3)
@pytest.mark.cpu_only("autocast is a CPU's here")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("layout", "exchange", "softmax"), WAYS)
def test_several_ranks(
    group: dist.ProcessGroup, gen: torch.Generator, layout: str, exchange: str, softmax: str, op: str
):
    compare(SequenceParallel(group, layout=layout, state_exchange=exchange, softmax=softmax), gen, op)


@pytest.mark.mpi
@pytest.mark.cpu_only("autocast is a CPU's here")
def test_a_model_trains_under_it_as_on_one_rank(group: dist.ProcessGroup, gen: torch.Generator):
    """As Transformers' Trainer(bf16=True) has it: float32 weights, the forward pass and the loss under autocast."""
    torch.manual_seed(0)
    model = Decoder(tiny("gated_delta_net", "LLLN"))
    model.checkpoint_layers = True
    tokens = torch.randint(64, (1, TOKENS), generator=gen)

    def gradient(parallel: SequenceParallel) -> Tensor:
        seq = parallel.sequence(TOKENS)
        with torch.autocast("cpu", HALF):
            loss = seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(tokens)))
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert loss.dtype == grads.dtype == torch.float32
        if parallel.group is not None:
            dist.all_reduce(grads, group=parallel.group)
        return grads

    assert error(gradient(SequenceParallel(group, layout="zigzag")), gradient(SequenceParallel(None))) < 0.03
