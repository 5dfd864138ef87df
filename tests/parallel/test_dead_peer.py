"""A peer that stops answering in the middle of an exchange ends it with an error, within the timeout: each of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys

TIMEOUT = 4.0

RANK = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from lasp.parallel import SequenceParallel

torch.set_num_threads(1)
timeout = timedelta(seconds=float(sys.argv[1]))
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
names = "all_gather", "ring", "scan", "symmetric_memory"
states = torch.randn(2, 1, 2, 8, 8)
made = []
for name in names:
    group = dist.new_group(timeout=timeout)
    exchange = SequenceParallel(group, layout="zigzag", state_exchange=name).exchange
    assert exchange.forward(states, None, (False,) * 4).wait()[0].isfinite().all()
    made.append(exchange)
dist.barrier()
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
for name, exchange in zip(names, made):
    start = time.monotonic()
    try:
        exchange.forward(states, None, (False,) * 4).wait()
    except RuntimeError as error:
        print(f"{name}: {time.monotonic() - start:.1f} s: {str(error).splitlines()[0]}", flush=True)
os._exit(0)
"""


def test_every_exchange_notices_a_dead_peer():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(TIMEOUT)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output, _ = processes[0].communicate(timeout=150)
        found = dict(line.split(": ", 1) for line in output.splitlines() if " s: " in line)
        assert set(found) == {"all_gather", "ring", "scan", "symmetric_memory"}, output
        for story in found.values():
            assert float(story.split(" s: ")[0]) < TIMEOUT + 5, output
        if shutil.which("c++"):  # else it is an all-gather
            assert "rank 1 of the group did not come" in found["symmetric_memory"], output
        assert processes[1].poll() is None
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
