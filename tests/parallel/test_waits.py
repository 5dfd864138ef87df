"""The rank that keeps the others waiting is known by its own waiting least."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import comm
from lasp.parallel.waits import waits
from lasp.training.metrics import read_metrics
from lasp.training.train import train
from tests.parallel import test_training

pytestmark = [pytest.mark.mpi, pytest.mark.no_exchange, pytest.mark.cpu_only("it trains on CPUs"), pytest.mark.ranks(3)]

config = test_training.config


def test_a_slow_rank_is_named_in_the_metrics(ranks, config, monkeypatch):
    monkeypatch.setattr(waits, "take", lambda: [3.0, 0.5, 2.5][ranks.rank])
    train(replace(config, steps=1))
    ranks.barrier("it is finished")
    (step,) = [r for r in read_metrics(config.run_dir) if "loss" in r]
    assert (step["slowest_rank"], step["waited_for_it"]) == (1, 2.0)


def test_waits_are_measured_where_that_is_asked_for(ranks):
    def exchange():
        comm.all_gather(torch.ones(3), dist.group.WORLD).wait()
        return waits.take()

    waits.take()  # what was before
    assert exchange() == 0
    with waits.measured():
        assert exchange() > 0
        assert waits.take() == 0
    assert exchange() == 0
