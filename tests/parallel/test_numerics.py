"""What is not finite on one rank is named by all of them, with that rank; replicas that drift apart are, too."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lasp.models import Decoder
from lasp.parallel.apply import parallelize
from lasp.parallel.groups import make_mesh
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.native import NativeEngine
from lasp.training.numerics import any_nonfinite, require_same_replicas
from lasp.training.train import train
from tests.parallel import test_training

pytestmark = [pytest.mark.mpi, pytest.mark.no_exchange, pytest.mark.cpu_only("it trains on CPUs"), pytest.mark.ranks(3)]

config = test_training.config
NAME = "layers.1.mixer_norm.weight"


@pytest.fixture
def spoil(ranks, monkeypatch):
    """One element of one rank's gradient is infinite in its second backward pass, and whenever it is computed again."""

    def spoiled(self, loss):
        backward(self, loss)
        passes.append(self)
        if ranks.rank == ranks.size - 1 and len(passes) >= 2:
            gradient = self.model.get_parameter(NAME).grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0] = math.inf

    passes, backward = [], NativeEngine.backward
    monkeypatch.setattr(NativeEngine, "backward", spoiled)
    return passes


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_rank_of_a_gradient_that_is_not_finite_is_named(ranks, config, spoil, fsdp):
    last = ranks.size - 1
    config = replace(config, parallel=replace(config.parallel, fsdp=fsdp))  # a context for each rank
    with pytest.raises(FloatingPointError) as error:
        train(config)
    told = f"step 2, contexts {ranks.size} to {2 * ranks.size - 1}: gradient norm: got inf, expected a finite number; "
    assert str(error.value).startswith(told)
    assert f"a gradient that is first not finite in {NAME}, on rank {last}" in str(error.value)


def test_all_ranks_leave_out_the_same_steps(ranks, config, spoil):
    with pytest.raises(FloatingPointError, match="^step 3,"):
        train(replace(config, skip_nonfinite=1))
    ranks.barrier("all have stopped")
    assert [r.get("skipped") for r in read_metrics(config.run_dir) if "lr" in r] == [None, 1]
    assert any_nonfinite(torch.tensor([1.0, math.nan if ranks.rank == 1 else 1.0]), dist.group.WORLD) == 1.0
    assert any_nonfinite(torch.ones(2), dist.group.WORLD) == 0.0


def test_a_replica_with_another_bit_is_named(ranks, config):
    """Here of a layer norm, then of experts, which some ranks share; shards have no replicas."""
    mesh = make_mesh("cpu", torch.arange(ranks.size).view(1, -1), ("dp", "sp"))
    model = parallelize(Decoder(config.model).double(), mesh)
    require_same_replicas(model, dist.group.WORLD)
    if ranks.rank == 1:
        weight = model.get_parameter(NAME).data
        weight[3] = torch.nextafter(weight[3], weight.new_tensor(9.0))
    told = rf"^{NAME}: got replicas of hash \w+ on rank 0, 2, \w+ on rank 1, expected the same"
    with pytest.raises(RuntimeError, match=told):
        require_same_replicas(model, dist.group.WORLD)
    require_same_replicas(parallelize(Decoder(config.model), mesh, fsdp=True), dist.group.WORLD)

    shape = replace(config.model, num_experts=3, expert_intermediate_size=12)
    for spread in (1, 3):  # replicas on all ranks, and none
        model = parallelize(Decoder(shape), mesh, expert_parallel=spread)
        stack = next(parameter for parameter in model.parameters() if parameter.ndim == 3)
        own = stack.to_local() if spread > 1 else stack
        if ranks.rank == 2:
            own.data[0, 0, 0] += 1
        if spread == 1:
            with pytest.raises(RuntimeError, match=r"experts.*on rank 0, 1, \w+ on rank 2"):
                require_same_replicas(model, dist.group.WORLD)
        else:
            require_same_replicas(model, dist.group.WORLD)


def test_a_run_whose_replicas_drift_apart_saves_nothing(ranks, config, monkeypatch):
    step = NativeEngine.step

    def drift(self, lr, loss):
        norm = step(self, lr, loss)
        if ranks.rank == 1:
            self.model.get_parameter(NAME).data[0] += 1e-9
        return norm

    monkeypatch.setattr(NativeEngine, "step", drift)
    with pytest.raises(RuntimeError, match=f"^{NAME}: got replicas of hash"):
        train(replace(config, compare_replicas_every=1, checkpoint_every=1))
    assert checkpoint.latest(config.run_dir) is None
