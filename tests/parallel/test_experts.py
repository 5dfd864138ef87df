"""Mixtures of experts over ranks equal one rank: losses, norms, weights, loads and biases, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lasp.config import DataConfig, OptimizerConfig, TrainConfig
from lasp.kernels.experts import grouped_matmul, swiglu_experts
from lasp.models import Decoder, tiny
from lasp.models.moe import Router
from lasp.parallel import SequenceParallel
from lasp.parallel.apply import parallelize, reduce_gradients
from lasp.parallel.experts import ExpertParallel
from lasp.training import checkpoint
from lasp.training.balance import balance_experts
from lasp.training.optimizer import build_optimizer, clip_gradients
from tests.parallel.test_training import splits

pytestmark = [pytest.mark.mpi, pytest.mark.cpu_only("it trains on CPUs")]
TOLERANCE = 1e-9
STEPS = 3
TOKENS = 53  # not divisible by two or more: there is padding
DOCUMENTS = (0, 3, 3, 20, 48, 53)
LOSSES = {"router_scores": "softmax", "aux_loss_weight": 0.1, "z_loss_weight": 0.01}
BIASES = {"router_scores": "sigmoid", "aux_loss_weight": 0.0, "expert_bias_rate": 0.05, "num_shared_experts": 1}


def config(**changes):
    """Every number of ranks up to four divides the experts and their rows."""
    sizes = {"hidden_size": 12, "num_experts": 12, "expert_intermediate_size": 24, "moe_every": 2}
    return replace(tiny("gated_delta_net", "LLNL"), **(sizes | changes))


def build(model_config) -> Decoder:
    """The same weights on every rank and in every call; so large that everything matters, yet not chaotic."""
    torch.manual_seed(0)
    model = Decoder(model_config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model


def watch_margins(model) -> list[float]:
    """The least distance, in each call of a router, between the scores of the last expert chosen and the next one.

    A choice between scores that differ by rounding alone would be another one on other ranks, and rightly so.
    """
    margins = []

    def look(router, inputs, _):
        x, valid = inputs
        logits = x[valid] @ router.proj.weight.mT
        scores = logits.softmax(-1) if router.softmax else logits.sigmoid()
        ranked = (scores if router.bias is None else scores + router.bias).sort(descending=True).values
        margins.append((ranked[:, router.experts_per_token - 1] - ranked[:, router.experts_per_token]).min().item())

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(look)
    return margins


def train(model, parallel, batches, documents, mesh) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Loss, gradient norm, balancing loss and load of each step of SGD, and weights and biases afterwards."""
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim < 3]},
            {"params": [p for p in model.parameters() if p.ndim == 3]},
        ],
        lr=0.02,
    )
    seen = []
    for tokens, labels in batches:
        seq = parallel.sequence(TOKENS, None if documents is None else torch.tensor(documents))
        loss = seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels)))
        loss.backward()
        if mesh is not None:
            reduce_gradients(model, mesh)
        norm = clip_gradients(model, float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        seen += [loss.item(), norm.item(), *(x.item() for x in balance_experts(model, seq.sum).values())]
    return seen, {name: whole(x) for name, x in model.state_dict().items()}


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def draw_batches(gen: torch.Generator):
    for _ in range(STEPS):
        tokens, labels = (torch.randint(64, (1, TOKENS), generator=gen) for _ in range(2))
        yield tokens, labels.masked_fill(torch.rand(labels.shape, generator=gen) < 0.1, -100)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("fsdp", [False, True], ids=["", "fsdp"])
@pytest.mark.parametrize(
    ("balancing", "layout", "recompute", "documents"),
    [(LOSSES, "zigzag", True, DOCUMENTS), (BIASES, "contiguous", False, None)],
    ids=["losses", "biases"],
)
def test_training_equals_one_rank(gen, ranks, pytestconfig, balancing, layout, recompute, documents, fsdp):
    batches = list(draw_batches(gen))
    alone = build(config(**balancing))
    margins = watch_margins(alone)
    wanted, wanted_state = train(alone, SequenceParallel(None), batches, documents, None)
    assert min(margins) > 1e-10, "two scores are as good as equal: take another --seed"
    for expert_parallel in splits(ranks.size, pytestconfig.getoption("full")):
        mesh = init_device_mesh("cpu", (1, ranks.size), mesh_dim_names=("dp", "sp"))
        model = build(config(**balancing))
        model.checkpoint_layers = recompute
        parallelize(model, mesh, fsdp=fsdp, expert_parallel=expert_parallel)
        parallel = SequenceParallel(mesh["sp"].get_group(), layout=layout)
        got, state = train(model, parallel, batches, documents, mesh)
        assert got == pytest.approx(wanted, rel=TOLERANCE)
        for name, x in wanted_state.items():
            torch.testing.assert_close(state[name], x, rtol=0, atol=TOLERANCE * x.norm().item(), msg=name)


@pytest.mark.parametrize("fsdp", [False, True], ids=["", "fsdp"])
def test_experts_spread_over_data_and_sequence_parallel_ranks(gen, ranks, fsdp):
    """DP x SP = 2 x 2, two contexts: gradients and loads of one rank that sees both, for each spread of the experts."""
    if ranks.size != 4:
        pytest.skip("wants 4 ranks")
    batches = list(draw_batches(gen))[:2]
    alone, one = build(config(**LOSSES)), SequenceParallel(None)
    margins = watch_margins(alone)
    count = sum(int((labels != -100).sum()) for _, labels in batches)
    for tokens, labels in batches:
        (alone(tokens, one.sequence(TOKENS), labels=labels)[0] / count).backward()
    wanted = {name: x.item() for name, x in balance_experts(alone, lambda x: x).items()}
    assert min(margins) > 1e-10, "two scores are as good as equal: take another --seed"
    for expert_parallel in divisors(4):
        world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
        model = parallelize(build(config(**LOSSES)), world, fsdp=fsdp, expert_parallel=expert_parallel)
        seq = SequenceParallel(world["sp"].get_group(), layout="zigzag").sequence(TOKENS)
        tokens, labels = batches[world["dp"].get_local_rank()]
        (model(seq.shard(tokens), seq, labels=seq.shard(labels))[0] / count).backward()
        reduce_gradients(model, world)
        everyone = SequenceParallel(dist.group.WORLD).sequence(TOKENS)
        assert balance_experts(model, everyone.sum) == pytest.approx(wanted, rel=TOLERANCE)
        for (name, got), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            size = expected.grad.norm().item()
            torch.testing.assert_close(whole(got.grad), expected.grad, rtol=0, atol=TOLERANCE * size, msg=name)


def test_rows_travel_to_their_experts_and_back(gen, group):
    """Also from a rank that has none; y and all gradients are those of one rank that holds all experts."""
    size, rank = group.size(), group.rank()
    experts = 2 * size

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    matrices = normal(experts, 3, 8), normal(experts, 4, 3)
    rows = [torch.randint(0, 5, (experts,), generator=gen) * (r > 0 or size == 1) for r in range(size)]
    inputs = [(normal(counts.sum(), 3), counts, normal(counts.sum(), 3)) for counts in rows]

    def run(function, x, counts, dy, stacks):
        x = x.clone().requires_grad_()
        y = function(x, counts, *stacks)
        return y, torch.autograd.grad(y, [x, *stacks], dy)

    stacks = [m.clone().requires_grad_() for m in matrices]
    alone = [run(swiglu_experts, *given, stacks) for given in inputs]
    part = DeviceMesh.from_group(group, "cpu")
    spread = [distribute_tensor(m, part, [Shard(0)]).requires_grad_() for m in matrices]
    y, (dx, *grads) = run(ExpertParallel(group, swiglu_experts), *inputs[rank], spread)
    assert (y - alone[rank][0]).norm() <= 1e-12 * sum(y.norm() for y, _ in alone)
    assert (dx - alone[rank][1][0]).norm() <= 1e-12 * sum(dx.norm() for _, (dx, *_) in alone)
    for index, grad in enumerate(grads):
        wanted = sum(all_grads[1 + index] for _, all_grads in alone)
        assert (grad.to_local() - wanted.chunk(size)[rank]).norm() <= 1e-12 * wanted.norm()


@pytest.mark.no_exchange
def test_ranks_that_differ_in_more_than_their_rows_are_told(group):
    size, other = group.size(), group.rank() == group.size() - 1
    x, counts, matrix = torch.zeros(size, 3), torch.ones(size, dtype=torch.int64), torch.zeros(1, 3, 3)
    spread = ExpertParallel(group, grouped_matmul)
    for name, given in {"x": x[:, : 2 if other else 3], "gradient of x": x.clone().requires_grad_(other)}.items():
        if size > 1:
            with pytest.raises(ValueError, match=f"different ranks, expected the same in experts: {name}: rank 0"):
                spread(given, counts, matrix)


@pytest.mark.no_exchange
@pytest.mark.ranks(4)
@pytest.mark.parametrize("fsdp", [False, True], ids=["", "fsdp"])
def test_checkpoints_load_into_other_spreads_bit_for_bit(gen, ranks, shared_tmp_path, fsdp):
    model_config = config(**BIASES)
    run = TrainConfig(
        model=model_config,
        data=DataConfig(train="none", valid="none"),
        run_dir=str(shared_tmp_path / "run"),
        steps=1,
        context_length=TOKENS,
    )

    def make(expert_parallel):
        mesh = init_device_mesh("cpu", (ranks.size,))
        model = parallelize(build(model_config), mesh, fsdp=fsdp, expert_parallel=expert_parallel)
        return model, build_optimizer(model, OptimizerConfig())

    def everything(model, optimizer):
        moments = {
            f"{name} {kind}": whole(optimizer.state[p][kind])
            for name, p in model.named_parameters()
            for kind in ("exp_avg", "exp_avg_sq", "step")
        }
        return {name: whole(x) for name, x in model.state_dict().items()} | moments

    spreads = divisors(ranks.size)
    for step, (before, after) in enumerate(zip([*spreads, spreads[-1]], [*spreads[1:], 1, 1], strict=False)):
        model, optimizer = make(before)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=gen, dtype=p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()
        optimizer.zero_grad()
        model.move_expert_biases(torch.randint(100, (2, 12), generator=gen))
        checkpoint.save(run.run_dir, step + 1, model, optimizer, run)
        ranks.barrier(f"{run.run_dir} {step}")
        other, other_optimizer = make(after)
        assert checkpoint.restore(run.run_dir, other, other_optimizer, run) == step + 1
        expected, got = everything(model, optimizer), everything(other, other_optimizer)
        assert expected.keys() == got.keys()
        for name, x in expected.items():
            assert torch.equal(got[name], x), name


@pytest.mark.no_exchange
@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (tiny(), 0, "expert_parallel: got .*, expected 1 for a model without experts"),
        (config(), 1, "expert_parallel: got .*, expected a divisor of the mesh's"),
        (config(num_experts=13), 0, "num_experts: got 13, expected a multiple of expert_parallel="),
    ],
)
def test_what_does_not_fit_is_refused_everywhere(ranks, model, more, message):
    with pytest.raises(ValueError, match=message):
        parallelize(build(model), init_device_mesh("cpu", (ranks.size,)), expert_parallel=ranks.size + more)
