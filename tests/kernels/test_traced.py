"""Operations as nodes of graphs: what PyTorch asks of such, that compilers may do with memory what they like, and whole
models in one graph."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.optests import aot_autograd_check

from lasp.kernels import (
    causal_conv1d,
    delta_product,
    delta_rule,
    linear_attention,
    log_linear_attention,
    log_linear_delta_rule,
    short_conv,
    softmax_attention,
    traced,
)
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.parts import Part, Parts
from lasp.models import Decoder, tiny
from lasp.parallel import Sequence, SequenceParallel, Stream
from tests.parallel.test_new_op import MovingAverages, Tokens

pytestmark = pytest.mark.skipif(not traced.AVAILABLE, reason="wants a PyTorch whose nodes take handles")
HEADS, SIZE, TOKENS = 2, 4, 12
PARTS = Parts(HEADS, (Part(2, unit_length=True), Part(1)))


@pytest.fixture
def draw(gen):
    def draw(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64, device="cpu").requires_grad_()

    return draw


@pytest.fixture
def calls(draw):
    """Of each operation: the function, its arguments by name, and which results its backward reads."""
    q, k, v, state = (draw(1, TOKENS, HEADS, SIZE) for _ in range(3)), None, None, draw(1, HEADS, SIZE, SIZE)
    q, k, v = q
    k = F.normalize(k.detach(), dim=-1).requires_grad_()
    decay, beta = (-draw(1, TOKENS, HEADS).exp()).detach(), draw(1, TOKENS, HEADS).detach().sigmoid().requires_grad_()
    levels = draw(1, TOKENS, HEADS, 8)
    past = FenwickState(draw(1, 2, HEADS, SIZE, SIZE), torch.tensor([3]))
    x, weight = draw(1, TOKENS, HEADS * 3), draw(HEADS * 3, 3)
    offsets = torch.tensor([0, 5, TOKENS])
    qkv = {"q": q, "k": k, "v": v}
    return [
        (linear_attention, qkv | {"decay": decay, "initial_state": state, "output_final_state": True}, ()),
        (linear_attention, qkv | {"causal": False}, ()),
        (delta_rule, qkv | {"beta": beta, "decay": decay, "cu_seqlens": offsets}, ()),
        (log_linear_attention, qkv | {"decay": decay, "level_scales": levels, "initial_state": past}, ()),
        (log_linear_delta_rule, qkv | {"beta": beta, "decay": None, "level_scales": levels}, ()),
        (softmax_attention, qkv | {"window": 5}, (0, 1)),
        (causal_conv1d, {"x": x, "weight": weight}, ()),
        (short_conv, {"x": x, "weight": weight, "bias": draw(HEADS * 3), "parts": PARTS}, ()),
        (delta_product, {"q": q, "k": k[:, :, None], "v": v[:, :, None], "beta": beta[:, :, None], "decay": decay}, ()),
    ]


def as_node(function, given):
    """The node of an operation, and its arguments as it takes them."""
    node = getattr(torch.ops.lasp, function.__name__).default
    arguments = []
    for argument in node._schema.arguments[:-1]:
        default = {"causal": True, "output_final_state": False, "backend": "auto"}.get(argument.name)
        value = given.get(argument.name, default)
        kind = traced._KINDS.get(type(value) if isinstance(value, Parts) else None)
        value = kind.write(value) if kind else value
        arguments.append(list(value or ()) if str(argument.type) == "List[Tensor]" else value)
    learns = [x.requires_grad for x in traced._tensors(arguments)]
    return node, [*arguments, learns]


def gradients(outputs, inputs, of):
    return torch.autograd.grad([x for x in outputs if x.requires_grad], inputs, of)


def test_nodes_are_what_pytorch_asks_for(calls):
    for function, given, _ in calls:
        node, arguments = as_node(function, given)
        torch.library.opcheck(
            node, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
        # The last of opcheck's tests, without the handle, which it cannot compare.
        aot_autograd_check(lambda *given, node=node: node(*given)[0], arguments, {}, dynamic=False)


def test_what_a_call_keeps_lies_in_no_memory_that_others_may_be_given(calls):
    for function, given, reads in calls:
        node, arguments = as_node(function, given)
        inputs = [x for x in traced._tensors(arguments) if x.requires_grad]
        outputs = [x for x in traced._tensors(function(**given)) if x.requires_grad]
        of = [torch.randn_like(x) for x in outputs]
        wanted = gradients(outputs, inputs, of)
        with torch.no_grad():
            here = traced._replaced(arguments[:-1], (x.clone() for x in traced._tensors(arguments)))
            results, call = node(*here, arguments[-1])
            given_again = [x.clone() for x in (*traced._tensors(here), *(results[i] for i in reads))]
            for x in (*traced._tensors(here), *results):
                if x.is_floating_point():
                    x.fill_(math.nan)
            upstream = [*of, *([None] * (len(results) - len(of)))]
            found = torch.ops.lasp.backward(call, upstream, given_again, arguments[-1])
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b), function.__name__


def test_what_outlives_a_call_is_copied_for_a_graph():
    seq = SequenceParallel(None).sequence(9)
    for name in ("positions", "valid"):
        ((copy,), _), own = getattr(torch.ops.lasp, f"sequence_{name}")(seq, []), getattr(seq, name)
        assert torch.equal(copy, own) and copy.data_ptr() != own.data_ptr()


def test_graphs_leave_open_how_many_states_there_are(calls):
    """In packed batches, and slots of log-linear attention in all."""
    seq = SequenceParallel(None).sequence(TOKENS, torch.tensor([0, 5, TOKENS]))
    (_, linear, _), (_, levels, _) = calls[0], calls[3]
    linear = {name: linear[name] for name in ("q", "k", "v", "decay")}

    def squares(seq, linear, levels):
        o, state = seq.linear_attention(**linear, output_final_state=True)
        p, slots = log_linear_attention(**levels, output_final_state=True)
        return o.sum() + p.sum() + state.square().sum() + slots.slots.square().sum() + slots.tokens.sum()

    torch._dynamo.reset()
    inputs = [linear["q"], linear["k"], linear["v"], levels["level_scales"]]
    values = [f(seq, linear, levels) for f in (squares, torch.compile(squares, backend="aot_eager", fullgraph=True))]
    assert torch.equal(*values)
    for a, b in zip(*(torch.autograd.grad(value, inputs) for value in values), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_operations_of_ones_own_over_the_sequence_are_nodes(draw):
    """Other than by themselves, where `Sequence.run` breaks the graph: then in one with what is around them."""
    x = draw(1, TOKENS, HEADS, SIZE)

    @traced.traced(lambda seq, x: [x.new_empty(x.shape)])
    def differences(seq: Sequence, x: torch.Tensor) -> torch.Tensor:
        return seq.run(MovingAverages(), Tokens(x, states=2))[0]

    torch._dynamo.reset()
    compiled, graphs = (
        torch.compile(lambda seq, x: differences(seq, x.sin()).cos(), backend="aot_eager", fullgraph=True),
        [],
    )
    for offsets in ([0, 5, TOKENS], [0, 2, 9, TOKENS]):
        seq = SequenceParallel(None).sequence(TOKENS, torch.tensor(offsets))
        wanted, got = differences(seq, x.sin()).cos(), compiled(seq, x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(y.sum(), x) for y in (got, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_recurrences_of_segments_go_on_in_graphs(draw):
    """From the state of the segment before."""
    x = draw(1, TOKENS, HEADS, SIZE)

    def layer(segment, x, state):
        y = x.sin()
        o, state = segment.linear_attention(y, y, y, initial_state=state, output_final_state=True)
        return o.exp(), state

    torch._dynamo.reset()
    found = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        stream, state, outputs = Stream(SequenceParallel(None), TOKENS, 5, torch.tensor([0, 7, TOKENS])), None, []
        for segment, part in zip(stream, stream.shard(x), strict=True):
            o, state = function(segment, part, state if segment.past else None)
            outputs.append(o)
        value = torch.cat(outputs, 1).square().sum() + state.sum()
        found.append([value, *torch.autograd.grad(value, x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_mixture_of_experts_is_in_its_models_graph(gen, recompute):
    torch.manual_seed(0)
    experts = {"num_experts": 3, "expert_intermediate_size": 4, "num_shared_experts": 1, "expert_bias_rate": 0.1}
    model = Decoder(replace(tiny(), vocab_size=61, num_layers=1, pattern="N", **experts)).double()
    model.recompute = recompute

    def loss(seq, tokens, labels):
        return seq.mean(*model(tokens, seq, labels=labels))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for offsets in ([0, 9, 30], [0, 2, 5, 30]):
        tokens, labels = torch.randint(61, (2, 1, 30), generator=gen, device="cpu")
        seq, found = SequenceParallel(None).sequence(30, torch.tensor(offsets)), []
        for function in (loss, compiled):
            model.zero_grad()
            value = function(seq, tokens, labels)
            value.backward()
            found.append([value.detach(), *(p.grad.clone() for p in model.parameters()), *model.balance.take()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_and_its_loss_are_one_graph(gen, recompute):
    """Of batches of one length, packed or not; here of layers of each kind, the linear one with a window beside."""
    torch.manual_seed(0)
    config = replace(tiny(), vocab_size=61, num_layers=2, pattern="LN", mixer="log_linear_gated_delta_net", window=7)
    model, parallel = Decoder(config).double(), SequenceParallel(None, aligned=True)
    model.recompute = recompute

    def loss(seq, tokens, labels):
        return seq.mean(*model(tokens, seq, labels=labels))

    torch._dynamo.reset()
    compiled, graphs = torch.compile(loss, backend="aot_eager", fullgraph=True), []
    for offsets in ([0, 9, 30], [0, 2, 5, 30], None)[: 3 if recompute == "none" else 2]:
        tokens, labels = torch.randint(61, (2, 1, 30), generator=gen, device="cpu")
        seq = parallel.sequence(30, None if offsets is None else torch.tensor(offsets))
        found = []
        for function in (loss, compiled):
            model.zero_grad()
            value = function(seq, tokens, labels)
            value.backward()
            found.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] and graphs[-1] == graphs[0] + (recompute == "none")
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        compiled(seq, tokens + 61, labels)
