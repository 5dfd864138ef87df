"""A rank that stops answering ends the run of the others, with an error, once its groups' timeout is over."""

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

from lasp.config import ParallelConfig
from tests.patience import PATIENCE

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, repr(config)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, error = processes[0].communicate(timeout=PATIENCE)
        assert processes[0].returncode != 0
        assert "imed out" in error or "imeout" in error, error
        assert "rank 0 of group 'default_pg', ranks [0, 1] of the world: agreement on " in error, error
        assert "on rank 0 of 2, during step 2" in error, error
        assert re.search(
            r"rank 1 \(process \d+ of .*\) was last seen \d+ s ago, during (its start|step [12]), at ", error
        ), error
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stderr.close()
