"""A stream of segments over several ranks gives one rank's loss and gradients on the whole sequence, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lasp.config import MIXERS
from lasp.kernels.keys import KeyStore
from lasp.models import Decoder
from lasp.parallel import SequenceParallel, Stream, parallelize
from lasp.training import streaming
from lasp.training.streaming import StreamedBatch
from tests.parallel import test_model
from tests.parallel.inputs import error, generator

TOLERANCE = 1e-10
TOKENS, SEGMENT = 29, 11  # neither divides the other, nor do units either
DOCUMENTS = (0, 1, 4, 4, 20, 25, 29)  # the fourth lies in two segments, and they end within documents
MIXTURE = {"num_experts": 4, "expert_intermediate_size": 12, "aux_loss_weight": 0.5, "z_loss_weight": 0.1}


def build(mixer: str, **changes) -> Decoder:
    """The same weights on every rank and in every call, so large that everything matters."""
    torch.manual_seed(0)
    model = Decoder(replace(test_model.config(mixer), **{"num_layers": 2, "pattern": "LN"} | changes)).double()
    numbers = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=numbers)
    return model


def gradients(model: Decoder, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Summed over the ranks."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    together = torch.cat([x.flatten() for x in found.values()])
    if group is not None:
        dist.all_reduce(together, group=group)
    parts = together.split([x.numel() for x in found.values()])
    return {name: part.view_as(x) for (name, x), part in zip(found.items(), parts, strict=True)}


def check(
    gen, group, make, documents=None, segment=SEGMENT, recompute=False, batch=1, graphs=1, **options
) -> tuple[Decoder, Decoder]:
    """Returns the model that one rank has trained without segments, and this rank's, which was trained in segments."""
    tokens, labels = (torch.randint(31, (batch, TOKENS), generator=gen) for _ in range(2))
    labels = labels.masked_fill(torch.rand(labels.shape, generator=gen) < 0.1, -100)
    count = int((labels != -100).sum())
    offsets = None if documents is None else torch.tensor(documents)

    alone, model = make(), make()
    seq = SequenceParallel(None).sequence(TOKENS, offsets)
    loss, _ = alone(tokens, seq, labels=labels)
    (loss / count).backward()

    model.checkpoint_layers = recompute
    if model.config.aligned:
        options |= {"state_exchange": "all_gather", "aligned": True}
    stream = Stream(SequenceParallel(group, **options), TOKENS, segment, offsets)
    streamed = StreamedBatch.of(stream, tokens, labels, graphs=graphs)
    total = streamed.backward(model, count)
    sums = [total, *streamed.loss(model.eval())]
    for x in sums:
        dist.all_reduce(x, group=group)
    assert error(total, loss.detach()) <= TOLERANCE
    wanted = gradients(alone, None)
    for name, got in gradients(model, group).items():
        assert error(got, wanted[name]) <= TOLERANCE, name
    held_out, _ = alone.eval()(tokens, seq, labels=labels)
    assert error(sums[1], held_out.detach()) <= TOLERANCE and sums[2] == count
    return alone, model


WAYS = {
    "whole": {"layout": "contiguous", "state_exchange": "ring", "recompute": True, "batch": 2, "graphs": 2},
    "packed": {"layout": "zigzag", "state_exchange": "all_gather", "documents": DOCUMENTS},
}


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(gen, group, mixer, way):
    check(gen, group, lambda: build(mixer), **WAYS[way])


@pytest.mark.mpi
@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(
    ("softmax", "documents"),
    [("auto", DOCUMENTS), ("all_gather", DOCUMENTS), ("ulysses", None), ("ulysses_ring", DOCUMENTS)],
)
def test_every_way_of_softmax_attention(gen, group, softmax, documents):
    size = dist.get_world_size(group)
    layers = {"pattern": "N", "num_heads": 4 * size, "num_kv_heads": 2 * size, "head_dim": 2}
    check(gen, group, lambda: build("linear", **layers), documents, layout="zigzag", softmax=softmax)


@pytest.mark.mpi
@pytest.mark.ranks(3)
@pytest.mark.parametrize("exchange", ["scan", "hierarchical", "symmetric_memory"])
def test_every_exchange(gen, group, exchange):
    check(gen, group, lambda: build("gated_delta_net", pattern="L"), DOCUMENTS, state_exchange=exchange)


@pytest.mark.mpi
@pytest.mark.ranks(2, 3)
def test_mixtures_balance_over_the_whole_stream(gen, group):
    """Experts' loads and balancing losses are those of all segments together."""
    models = check(gen, group, lambda: build("gla", **MIXTURE), DOCUMENTS, layout="zigzag", recompute=True)
    alone, here = (model.balance.take() for model in models)
    for wanted, got in zip(alone, here, strict=True):
        dist.all_reduce(got, group=group)
        assert error(got.double(), wanted.double()) <= TOLERANCE


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(("layout", "documents"), [("contiguous", DOCUMENTS), ("zigzag", None)])
def test_segments_shorter_than_the_convolutions_reach(gen, group, layout, documents):
    """A tail then stems from several segments, and a segment's units are one token long."""
    units = dist.get_world_size(group) * (2 if layout == "zigzag" else 1)
    check(gen, group, lambda: build("mamba2", conv_width=6), documents, segment=units, layout=layout)


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 4, 13])
def test_softmax_attention_segment_by_segment(gen, window, documents):
    """By hand, on one rank: a store between the segments, forward and then back."""
    offsets = None if documents is None else torch.tensor(documents)
    parallel = SequenceParallel(None, layout="zigzag")
    sizes = (4, 6), (2, 6), (2, 5), (4, 5)
    *inputs, do = (torch.randn(1, TOKENS, *size, generator=gen, dtype=torch.float64) for size in sizes)
    leaves = [x.requires_grad_() for x in inputs]
    seq, stream, store = parallel.sequence(TOKENS, offsets), Stream(parallel, TOKENS, SEGMENT, offsets), KeyStore()
    wanted = seq.unshard(seq.softmax_attention(*map(seq.shard, leaves), window=window))
    d_wanted = torch.autograd.grad(wanted, leaves, do)

    parts = list(zip(*map(stream.shard, leaves), strict=True))
    outputs = [
        segment.unshard(segment.softmax_attention(*part, window=window, keys=store))
        for segment, part in zip(stream, parts, strict=True)
    ]
    assert error(torch.cat(outputs, dim=1), wanted) <= TOLERANCE
    d_got = [torch.zeros_like(x) for x in leaves]
    for (start, stop), o in reversed(list(zip(stream.ranges, outputs, strict=True))):
        for total, d in zip(d_got, torch.autograd.grad(o, leaves, do[:, start:stop]), strict=True):
            total += d
    for got, d in zip(d_got, d_wanted, strict=True):
        assert error(got, d) <= TOLERANCE


def refusals(parallel: SequenceParallel):
    """What every rank must refuse; only the last rank's argument is wrong."""
    wrong = parallel.rank == parallel.size - 1
    units = parallel.layout.units
    yield "tokens: got 0", lambda: Stream(parallel, 0 if wrong else 9, 9)
    yield "segment_tokens: got 0", lambda: Stream(parallel, 9, 0 if wrong else 9)
    yield "segment_tokens: got .*float|segment_tokens: got 9.0", lambda: Stream(parallel, 9, 9.0 if wrong else 9)
    yield f"at least {units}", lambda: Stream(parallel, 99, units - 1 if wrong else units)
    yield "expected 99", lambda: Stream(parallel, 99, 50, torch.tensor([0, 98 if wrong else 99]))
    if parallel.size > 1:
        yield "segment_tokens", lambda: Stream(parallel, 99, 50 if wrong else 51)
    first, last = Stream(parallel, 8 * units, 4 * units)
    q = torch.zeros(1, len(first.positions), 2, 4, dtype=torch.float64)
    x, weight = q.flatten(2), torch.zeros(8, 3, dtype=torch.float64)
    state, tail = torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(1, 2, 8, dtype=torch.float64)
    nothing = None if wrong else state
    yield "initial_state: got None, expected what", lambda: last.linear_attention(q, q, q, initial_state=nothing)
    yield "initial_state: got shape", lambda: first.linear_attention(q, q, q, initial_state=state[:, : 2 - wrong])
    yield "initial_tail: got None, expected what", lambda: last.convolve(x, weight, None, None if wrong else tail)
    yield "initial_tail: got shape", lambda: last.convolve(x, weight, None, tail[:, : 2 - wrong])
    yield "initial_tail: got a list", lambda: last.convolve(x, weight, None, [tail] if wrong else tail)
    yield "weight: got None", lambda: last.convolve(x, None if wrong else weight, None, tail)
    yield "initial_tail: got None", lambda: last.causal_conv1d(x, weight)
    yield "causal: got False", lambda: first.linear_attention(q, q, q, causal=False)
    yield "causal: got False", lambda: first.softmax_attention(q, q, q, causal=False)
    yield "keys: got None", lambda: first.softmax_attention(q, q, q, keys=None if wrong else KeyStore())
    keys = [KeyStore(), KeyStore()]
    first.softmax_attention(q, q, q, keys=keys[0])
    yield (
        r"keys: got nothing of segments \[0\]",
        lambda: last.softmax_attention(q, q, q, keys=keys[wrong]),
    )
    yield "x: got 9 tokens", lambda: Stream(parallel, 99, 50).shard(torch.zeros(1, 9))


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("NCCL groups do not refuse together")
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_cannot_be_streamed_is_refused_on_every_rank(group: dist.ProcessGroup, layout):
    for message, call in refusals(SequenceParallel(group, layout=layout)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.ranks(2)
def test_sharded_weights_stay_gathered_where_there_is_room(gen, monkeypatch):
    """With and without: the same gradients, and fewer messages the more segments there are."""
    tokens, labels = torch.randint(31, (2, 1, TOKENS), generator=gen)
    world = init_device_mesh(torch.get_default_device().type, (2,), mesh_dim_names=("sp",))
    parallel = SequenceParallel(world["sp"].get_group(), layout="zigzag")
    model = parallelize(build("gated_delta_net"), world, fsdp=True)

    def gathered(fits: bool) -> tuple[int, dict[str, torch.Tensor]]:
        monkeypatch.setattr(streaming, "may_stay_gathered", lambda *sizes: fits)
        model.zero_grad(set_to_none=True)
        with torch.profiler.profile() as profile:
            StreamedBatch.of(Stream(parallel, TOKENS, SEGMENT), tokens, labels).backward(model, TOKENS)
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        return sum("fsdp::all_gather" in event.name for event in profile.events()), grads

    (few, kept), (many, wanted) = gathered(True), gathered(False)
    assert many >= 3 * few > 0  # three segments
    for name, grad in wanted.items():
        torch.testing.assert_close(kept[name], grad, rtol=0, atol=TOLERANCE * grad.norm().item(), msg=name)
