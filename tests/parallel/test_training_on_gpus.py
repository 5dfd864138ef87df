"""A run over NCCL, a GPU for each rank: nobody waits for a GPU between logged steps; what one rank meets ends or stops
all of them; a stopped run goes on."""

import math
from dataclasses import replace

import pytest
import torch

from lasp.training import checkpoint, reading
from lasp.training.metrics import read_metrics
from lasp.training.stop import Stopped
from lasp.training.train import train
from tests.cuda_waits import require_no_cuda_waits
from tests.parallel import test_numerics, test_stopping, test_training

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.no_exchange,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants a GPU for each rank"),
]
spoil, tell_one_rank = test_numerics.spoil, test_stopping.tell_one_rank
of_cpus = test_training.config


@pytest.fixture(autouse=True)
def from_the_host():
    """Tensors are made on the host, as in a run."""
    with torch.device("cpu"):
        yield


@pytest.fixture
def config(ranks, of_cpus):
    """Contexts that all ranks share."""
    parallel = replace(of_cpus.parallel, sequence_parallel=ranks.size, layout="zigzag")
    model = replace(of_cpus.model, head_dim=32, value_head_dim=32)  # of which there are kernels
    return replace(of_cpus, model=model, device="cuda", dtype="float32", batch_contexts=1, parallel=parallel)


@pytest.mark.parametrize("fsdp", [False, True])
def test_no_rank_waits_for_its_gpu_between_logged_steps(config, monkeypatch, fsdp):
    config = replace(config, steps=9, log_every=4, eval_every=9, checkpoint_every=9)
    require_no_cuda_waits(replace(config, parallel=replace(config.parallel, fsdp=fsdp)), monkeypatch)


@pytest.mark.parametrize("fsdp", [False, True])
def test_one_ranks_gradient_halts_all(ranks, config, spoil, monkeypatch, fsdp):
    """From the second step on; nobody knows before others are begun."""
    monkeypatch.setattr(reading, "PERIOD", math.inf)
    config = replace(config, steps=6, log_every=5, eval_every=6, checkpoint_every=6)
    config = replace(config, parallel=replace(config.parallel, fsdp=fsdp))
    with pytest.raises(FloatingPointError, match="^step 2, context 1: gradient norm: got inf") as error:
        train(config)
    ranks.barrier(f"{config.run_dir} has stopped")
    assert f"first not finite in {test_numerics.NAME}, on rank {ranks.size - 1}" in str(error.value)
    assert [record["step"] for record in read_metrics(config.run_dir) if "loss" in record] == [1]
    assert checkpoint.latest(config.run_dir) is None
    spoil.clear()
    with pytest.raises(FloatingPointError, match="^step 3,"):
        train(replace(config, run_dir=f"{config.run_dir}-skipping", skip_nonfinite=1))


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_that_one_rank_is_told_to_stop_goes_on(ranks, config, tell_one_rank, beside):
    config = replace(config, steps=4, checkpoint_async=beside, parallel=replace(config.parallel, fsdp=beside))
    straight = replace(config, run_dir=f"{config.run_dir}-straight")
    loss = train(straight)
    tell_one_rank(2)
    with pytest.raises(Stopped):
        train(config)
    ranks.barrier(f"{config.run_dir} has stopped")
    assert checkpoint.require_latest(config.run_dir).name == "step-00000002"
    assert train(config) == pytest.approx(loss, rel=1e-4)
    ranks.barrier(f"{config.run_dir} is finished")
    assert [record["step"] for record in read_metrics(config.run_dir) if "loss" in record] == [1, 2, 3, 4]
