"""Models over several ranks in one graph: messages are in its nodes, forward and backward."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lasp.kernels import traced
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel, comm
from lasp.parallel.apply import parallelize
from lasp.parallel.groups import make_mesh
from tests.parallel.inputs import generator

TOLERANCE, TOKENS = 1e-10, 30

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.ranks(2),
    pytest.mark.skipif(not traced.AVAILABLE, reason="wants a PyTorch whose nodes take handles"),
]


@pytest.mark.parametrize("mixer", ["log_linear_gated_delta_net"])
def test_a_compiled_model_over_ranks_equals_one_rank(group: dist.ProcessGroup, run_seed: int, mixer: str):
    """Packed in another way each time, with one graph for all; the loss, and the sum of the ranks' gradients."""
    numbers = generator(run_seed)
    torch.manual_seed(0)
    model = Decoder(replace(tiny(), vocab_size=61, num_layers=2, pattern="LN", mixer=mixer)).double()
    alone, parallel = (SequenceParallel(g, layout="zigzag", aligned=model.config.aligned) for g in (None, group))

    def loss(seq, tokens, labels):
        return seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels)))

    torch._dynamo.reset()
    compiled, graphs = torch.compile(loss, backend="aot_eager", fullgraph=True), []
    for offsets in ([0, 9, TOKENS], [0, 2, 5, TOKENS]):
        tokens, labels = torch.randint(61, (2, 1, TOKENS), generator=numbers, device=numbers.device)
        found = []
        for sp, function in ((alone, loss), (parallel, compiled)):
            model.zero_grad()
            value = function(sp.sequence(TOKENS, torch.tensor(offsets)), tokens, labels)
            value.backward()
            grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            found.append((value.detach(), comm.all_reduce(grads, sp.group).wait()))
        (wanted, gradient), (got, total) = found
        assert (got - wanted).abs() < TOLERANCE
        assert (total - gradient).norm() < TOLERANCE * gradient.norm()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


@pytest.mark.no_exchange
@pytest.mark.parametrize("fsdp", [False, True])
def test_models_that_are_spread_over_ranks_break_no_graph(ranks, run_seed: int, fsdp: bool):
    """With experts on other ranks the model is one graph. FSDP's hooks lie around blocks, so these are one each: with
    the hooks of experts which FSDP has spread there would be one inside."""
    numbers = generator(run_seed)
    torch.manual_seed(0)
    experts = {"num_experts": 4, "expert_intermediate_size": 4}
    config = replace(tiny(), vocab_size=61, num_layers=4, pattern="LNLN", **experts)
    tokens, labels = torch.randint(61, (2, 1, TOKENS), generator=numbers, device=numbers.device)
    seq = SequenceParallel(dist.group.WORLD).sequence(TOKENS, torch.tensor([0, 9, TOKENS]))
    mesh = make_mesh(numbers.device.type, torch.arange(ranks.size, device="cpu"), ("sp",))
    model = parallelize(Decoder(config).double(), mesh, fsdp=fsdp, expert_parallel=1 if fsdp else 2)

    def loss(tokens, labels):
        return seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels)))

    def step(function):
        model.zero_grad()
        value = function(tokens, labels)
        value.backward()
        grads = (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters())
        return [value.detach(), *(grad.clone() for grad in grads), *model.balance.take()]

    wanted = step(loss)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if fsdp:
        for block in model.layers:
            block.compile(backend="aot_eager", fullgraph=True)
        got = step(loss)
    else:
        got = step(torch.compile(loss, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == (2 if fsdp else 1)  # a block of each kind, or all
