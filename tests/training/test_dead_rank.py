"""A rank that stops answering ends the run of the others, with an error, once its groups' timeout is over."""

import re
from dataclasses import replace

from lasp.config import ParallelConfig
from tests.patience import PATIENCE
from tests.two_ranks import two_ranks

RANK = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from lasp.config import *
import lasp.training.train as loop
from lasp.training import heartbeat

heartbeat.PERIOD = 0.05
torch.set_num_threads(1)
learning_rate = loop.learning_rate

def stop(config, step, steps):
    if step == 1:
        for group in list(dist.distributed_c10d._world.pg_map):  # short now that everything has started
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
    return learning_rate(config, step, steps)

loop.learning_rate = stop
loop.train(eval(sys.argv[1]))
"""


def test_a_rank_that_hangs_ends_the_run(config):
    parallel = ParallelConfig(sequence_parallel=2, fsdp=False, timeout=2 * PATIENCE)
    config = replace(config, steps=1000, parallel=parallel)
    with two_ranks(RANK, repr(config)) as (one, other):
        told, _ = one.communicate(timeout=PATIENCE)
        assert one.returncode != 0
        assert "imed out" in told or "imeout" in told, told
        assert "rank 0 of group 'default_pg', ranks [0, 1] of the world: agreement on " in told, told
        assert "on rank 0 of 2, during step 2" in told, told
        assert re.search(
            r"rank 1 \(process \d+ of .*\) was last seen \d+ s ago, during (its start|step [12]), at ", told
        ), told
        assert other.poll() is None
