"""Whole models over several ranks equal one rank: loss, gradient norm and the weights after three steps, in float64."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lasp.config import MIXERS, ModelConfig
from lasp.models import Decoder, products
from lasp.models.recompute import POLICIES, Policy
from lasp.parallel import SequenceParallel, comm
from lasp.parallel.apply import parallelize, reduce_gradients
from tests.parallel.inputs import generator

TOLERANCE = 1e-9
STEPS = 3
TOKENS = 53  # not divisible by two or more: there is padding
DOCUMENTS = (0, 3, 3, 20, 48, 53)


def config(mixer: str) -> ModelConfig:
    """Norms with a large eps: dividing by an all but vanishing output would magnify rounding a millionfold."""
    window = {"mixer": "gla", "feature_map": "hedgehog", "window": 6, "short_conv": True}
    variant = window if mixer == "window" else {"mixer": mixer}
    return ModelConfig(
        vocab_size=31,
        hidden_size=12,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=16,
        norm_eps=1e-2,
        **variant,
    )


def build(mixer: str, recompute: Policy = "none") -> Decoder:
    """The same weights on every rank and in every call; so large that everything matters, yet not chaotic."""
    torch.manual_seed(0)
    model = Decoder(config(mixer)).double()
    model.recompute = recompute
    numbers = generator(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=numbers)
    return model


def train(model, parallel, batches, documents, mesh) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of STEPS steps of SGD, and the weights afterwards."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen = []
    for tokens, labels in batches:
        seq = parallel.sequence(TOKENS, None if documents is None else torch.tensor(documents))
        loss = seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels)))
        loss.backward()
        if mesh is not None:
            reduce_gradients(model, mesh)
        seen += [loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()]
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: p.detach() for name, p in model.named_parameters()}


def draw_batches(gen: torch.Generator):
    for _ in range(STEPS):
        tokens, labels = (torch.randint(31, (1, TOKENS), generator=gen) for _ in range(2))
        yield tokens, labels.masked_fill(torch.rand(labels.shape, generator=gen) < 0.1, -100)


@pytest.fixture(scope="module")
def mesh():
    """The world as one sequence-parallel group; module-scoped, since making it makes process groups."""
    return lambda: init_device_mesh(
        torch.get_default_device().type, (1, dist.get_world_size()), mesh_dim_names=("dp", "sp")
    )


ZIGZAG, CONTIGUOUS = ("zigzag", "all_gather", "ring", "none"), ("contiguous", "ring", "all_gather", "full")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("layout", "exchange", "softmax", "recompute", "packed"),
    [
        pytest.param(*ZIGZAG, False, id="zigzag"),
        pytest.param(*CONTIGUOUS, True, id="contiguous-packed", marks=pytest.mark.ranks(3)),
        pytest.param(*ZIGZAG, True, id="zigzag-packed", marks=pytest.mark.ranks()),  # with --full, as what follows
        pytest.param(*CONTIGUOUS, False, id="contiguous", marks=pytest.mark.ranks()),
    ],
)
@pytest.mark.parametrize("mixer", [*MIXERS, "window"])
def test_training_equals_one_rank(gen, mesh, mixer, layout, exchange, softmax, recompute, packed):
    batches, documents = list(draw_batches(gen)), DOCUMENTS if packed else None
    wanted, wanted_weights = train(build(mixer), SequenceParallel(None), batches, documents, None)
    world, aligned = mesh(), config(mixer).aligned
    ways = {"layout": layout, "state_exchange": "all_gather" if aligned else exchange, "softmax": softmax}
    parallel = SequenceParallel(world["sp"].get_group(), aligned=aligned, **ways)
    model = parallelize(build(mixer, recompute), world)
    got, got_weights = train(model, parallel, batches, documents, world)
    assert got == pytest.approx(wanted, rel=TOLERANCE)
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(got_weights[name], weight, rtol=0, atol=TOLERANCE * weight.norm().item())


def counted(function, calls: Counter, name: str):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call


@pytest.mark.mpi
@pytest.mark.ranks(2, 3)
def test_what_is_kept_of_exchanges_is_not_sent_again(gen, mesh, monkeypatch):
    """With the policy "selective", and with blocks' inputs in host memory."""
    batches = list(draw_batches(gen))
    wanted, wanted_weights = train(build("gated_delta_net"), SequenceParallel(None), batches, None, None)
    world, sent = mesh(), Counter()
    parallel = SequenceParallel(world["sp"].get_group(), layout="zigzag", state_exchange="all_gather", softmax="ring")
    for policy in ("none", "selective"):
        model = parallelize(build("gated_delta_net", policy), world)
        model.offload_activations = True
        with monkeypatch.context() as patch:
            for name in ("all_gather", "all_to_all", "shift"):
                send = getattr(comm, name)
                patch.setattr(comm, name, counted(send, sent, policy))
            got, got_weights = train(model, parallel, batches, None, world)
        assert got == pytest.approx(wanted, rel=TOLERANCE)
        for name, weight in wanted_weights.items():
            torch.testing.assert_close(got_weights[name], weight, rtol=0, atol=TOLERANCE * weight.norm().item())
    assert sent["selective"] == sent["none"] > 0


@pytest.mark.mpi
@pytest.mark.ranks(2)
@pytest.mark.parametrize("policy", POLICIES)
def test_sharded_weights_get_the_same_gradients_with_every_policy(gen, mesh, monkeypatch, policy):
    """FSDP's weights are gathered anew, and MLPs work in tiles, of at most 8 tokens here."""
    monkeypatch.setattr(products, "TILE", 8 * 32)
    ((tokens, labels),) = list(draw_batches(gen))[:1]

    def gradients(model, parallel) -> dict[str, torch.Tensor]:
        seq = parallel.sequence(TOKENS)
        seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels))).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}

    wanted, world = gradients(build("gated_delta_net"), SequenceParallel(None)), mesh()
    model = parallelize(build("gated_delta_net", policy), world, fsdp=True)
    model.offload_activations = True
    found = gradients(model, SequenceParallel(world["sp"].get_group(), layout="zigzag"))
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=TOLERANCE * grad.norm().item(), msg=name)


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("on NCCL groups each rank sums its own gradients")
def test_ranks_whose_models_differ_are_told(mesh):
    """Also where as many numbers learn on each, which would be summed with others."""
    everyone = mesh()
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(2)))
    model[dist.get_rank() == 1].requires_grad_(False)
    calls = [lambda: reduce_gradients(model, everyone), lambda: parallelize(model, everyone)]
    for call, told in zip(calls, ("nothing", "False"), strict=True):
        if everyone.size() == 1:
            call()
        else:
            with pytest.raises(ValueError, match=rf"different ranks.*[01].weight: .*{told}.*[01].weight: "):
                call()


@pytest.mark.mpi
def test_data_and_sequence_parallel_ranks_together(gen):
    """DP x SP = 2 x 2: two contexts, each over two ranks, give the gradient of one rank that sees both."""
    if dist.get_world_size() != 4:
        pytest.skip("wants 4 ranks")
    world = init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("dp", "sp"))
    batches = list(draw_batches(gen))[:2]
    alone, one = build("gated_delta_net"), SequenceParallel(None)
    count = sum(int((labels != -100).sum()) for _, labels in batches)
    for tokens, labels in batches:
        seq = one.sequence(TOKENS)
        (alone(tokens, seq, labels=labels)[0] / count).backward()

    model = parallelize(build("gated_delta_net"), world)
    parallel = SequenceParallel(world["sp"].get_group(), layout="zigzag")
    tokens, labels = batches[world["dp"].get_local_rank()]
    seq = parallel.sequence(TOKENS)
    (model(seq.shard(tokens), seq, labels=seq.shard(labels))[0] / count).backward()
    reduce_gradients(model, world)
    for (name, got), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=1e-9 * wanted.grad.norm().item(), msg=name)
