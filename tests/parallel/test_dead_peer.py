"""A peer that stops answering in the middle of an exchange ends it with an error, by its group's timeout: each of them.

Every other timeout is so long that the test would end before.
"""

import shutil
import subprocess
from contextlib import AbstractContextManager

import pytest
import torch

from tests.patience import PATIENCE
from tests.two_ranks import two_ranks

TIMEOUT = 3.0  # seconds

START = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from lasp.parallel import SequenceParallel
from lasp.parallel.combine import Affine

torch.set_num_threads(1)
timeout, patience = (timedelta(seconds=float(seconds)) for seconds in sys.argv[1:3])
rank = int(os.environ["RANK"])
algebra = Affine((False,) * 4, backward=False)

def tell(name, error):
    print(f"{name} ends: {str(error).splitlines()[0]}", flush=True)
"""

ON_CPUS = """
dist.init_process_group("gloo", timeout=2 * patience)
names = "all_gather", "ring", "scan", "symmetric_memory"
states = torch.randn(2, 1, 2, 8, 8)

def make(name):
    # Makes it anew until it works, for on a slow machine its beginning may take longer than the timeout.
    while True:
        works = torch.ones(())
        try:
            group = dist.new_group(timeout=timeout)
            exchange = SequenceParallel(group, layout="zigzag", state_exchange=name).exchange
            assert exchange.forward(states, None, algebra).wait()[0].isfinite().all()
        except RuntimeError:
            works.zero_()
        dist.all_reduce(works, dist.ReduceOp.MIN)
        if works:
            return exchange

made = [make(name) for name in names]
dist.barrier()
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
for name, exchange in zip(names, made):
    try:
        exchange.forward(states, None, algebra).wait()
    except RuntimeError as error:
        tell(name, error)
os._exit(0)
"""

ON_GPUS = """
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
dist.init_process_group("nccl", timeout=2 * patience, device_id=device)
group = dist.new_group(timeout=timeout)
exchange = SequenceParallel(group, layout="zigzag", state_exchange="symmetric_memory").exchange
states, matrices = torch.randn(2, 1, 2, 8, 8, device=device), torch.randn(2, 1, 2, 8, 8, device=device)
for transitions in None, matrices:
    assert exchange.forward(states, transitions, algebra).wait()[0].isfinite().all()
dist.barrier()
torch.cuda.synchronize()
if rank == 1:
    os.kill(os.getpid(), getattr(signal, sys.argv[3]))
late = [exchange.forward(states, transitions, algebra).wait()[0] for transitions in (None, matrices)]
assert all(x.isnan().all() for x in late)  # waits for the GPU
try:
    exchange.forward(states, None, algebra)
except RuntimeError as error:
    tell("symmetric_memory", error)
os._exit(0)
"""


def run(script: str, *arguments: str) -> AbstractContextManager[list[subprocess.Popen]]:
    return two_ranks(START + script, str(TIMEOUT), str(PATIENCE), *arguments)


def stories(process: subprocess.Popen) -> dict[str, str]:
    """What a rank told of each exchange's end."""
    output, _ = process.communicate(timeout=PATIENCE)
    found = dict(line.split(" ends: ", 1) for line in output.splitlines() if " ends: " in line)
    assert found, output
    return found


def test_every_exchange_notices_a_dead_peer():
    with run(ON_CPUS) as (one, other):
        found = stories(one)
        assert set(found) == {"all_gather", "ring", "scan", "symmetric_memory"}
        if shutil.which("c++") and shutil.which("ninja"):  # else it is an all-gather
            assert "rank 1 of the group did not come" in found["symmetric_memory"]
        assert other.poll() is None


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not (shutil.which("nvcc") and shutil.which("ninja")),
    reason="wants two GPUs, nvcc and ninja",
)
@pytest.mark.parametrize("end", ["SIGSTOP", "SIGKILL"])
def test_peer_writes_notice_a_dead_gpu(end: str):
    with run(ON_GPUS, end) as (one, _):
        assert "rank 1 of the group did not come" in stories(one)["symmetric_memory"]
