"""A run that one rank is told to stop stops on all of them, and goes on over other ranks as if nothing had been."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import lasp.training.train as loop
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.stop import Stopped
from lasp.training.train import train
from tests.parallel import test_training
from tests.parallel.test_training import alone
from tests.patience import PATIENCE

pytestmark = [pytest.mark.mpi, pytest.mark.no_exchange, pytest.mark.cpu_only("it trains on CPUs")]

ROOT = Path(__file__).parents[2]
ALONE = """
import sys
import torch
from lasp.config import *
from lasp.training.train import train

torch.set_num_threads(1)
train(eval(sys.argv[1]))
"""
config = test_training.config


@pytest.fixture
def tell_one_rank(ranks, monkeypatch):
    """The last rank gets a signal during the step that is named."""

    def tell(step: int) -> None:
        def learning_rate(config, at, steps):
            if at + 1 == step and ranks.rank == ranks.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(config, at, steps)

        original = loop.learning_rate
        monkeypatch.setattr(loop, "learning_rate", learning_rate)

    return tell


def require_curve(config, losses, norms):
    steps = [record for record in read_metrics(config.run_dir) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(losses) + 1))
    assert [record["loss"] for record in steps] == pytest.approx(losses, rel=1e-9)
    assert [record["grad_norm"] for record in steps] == pytest.approx(norms, rel=1e-9)


@pytest.mark.parametrize(
    "fsdp", [pytest.param(False, marks=pytest.mark.ranks(2)), pytest.param(True, marks=pytest.mark.ranks(4))]
)
def test_a_run_goes_on_over_another_split(ranks, config, tell_one_rank, fsdp):
    losses, norms, valid_loss, _ = alone(config)
    first, second = (
        replace(config, parallel=replace(config.parallel, sequence_parallel=n, layout="zigzag", fsdp=fsdp))
        for n in (1, ranks.size)
    )
    tell_one_rank(2)
    with pytest.raises(Stopped):
        train(first)
    ranks.barrier("it has stopped")
    assert checkpoint.require_latest(config.run_dir).name == "step-00000002"
    assert train(second) == pytest.approx(valid_loss, rel=1e-9)
    ranks.barrier("it is finished")
    require_curve(config, losses, norms)


@pytest.mark.ranks(3)
def test_a_run_goes_on_over_fewer_ranks_and_over_more(ranks, config, tell_one_rank):
    """Shards of three ranks are read by one, and those of one by three."""
    config = replace(config, steps=4, optimizer=replace(config.optimizer, schedule="wsd"))
    losses, norms, valid_loss, _ = alone(config)
    config = replace(config, parallel=replace(config.parallel, sequence_parallel=3, fsdp=True))
    tell_one_rank(1)
    with pytest.raises(Stopped):
        train(config)
    ranks.barrier("three have stopped")
    if ranks.rank == 0:
        one = replace(config, steps=3, parallel=replace(config.parallel, sequence_parallel=1))
        where = {name: value for name, value in os.environ.items() if "RANK" not in name and "WORLD" not in name}
        where["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), where.get("PYTHONPATH")]))
        subprocess.run([sys.executable, "-c", ALONE, repr(one)], env=where, check=True, timeout=PATIENCE)
    ranks.barrier("one has gone on")
    assert train(config) == pytest.approx(valid_loss, rel=1e-9)
    ranks.barrier("it is finished")
    require_curve(config, losses, norms)
