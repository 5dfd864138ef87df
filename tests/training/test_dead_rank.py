"""A rank that stops answering ends the run of the others, with an error, within the timeout."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

from lasp.config import ParallelConfig

TIMEOUT = 5.0

RANK = """
import os, signal, sys
import torch
from lasp.config import *
import lasp.training.train as loop

torch.set_num_threads(1)
learning_rate = loop.learning_rate

def stop(config, step, steps):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return learning_rate(config, step, steps)

loop.learning_rate = stop
loop.train(eval(sys.argv[1]))
"""


def test_a_rank_that_hangs_ends_the_run(config):
    config = replace(config, steps=1000, parallel=ParallelConfig(sequence_parallel=2, fsdp=False, timeout=TIMEOUT))
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
        while not os.path.exists(f"{config.run_dir}/metrics.jsonl"):
            assert processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.1)
        start = time.monotonic()
        _, error = processes[0].communicate(timeout=TIMEOUT + 30)
        assert time.monotonic() - start < TIMEOUT + 20  # the steps before the hang and Python's end take some of it
        assert processes[0].returncode != 0
        assert "imed out" in error or "imeout" in error, error
        assert "rank 0 of group 'default_pg', ranks [0, 1] of the world: agreement on " in error, error
        assert "on rank 0 of 2, during step 2" in error, error
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stderr.close()
