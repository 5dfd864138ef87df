"""Process groups: how long they wait, what they say when nobody comes, and how they end."""

import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from lasp.models import Decoder, tiny
from lasp.models.moe import Experts
from lasp.parallel import comm
from lasp.parallel.agreement import agree
from lasp.parallel.apply import parallelize
from lasp.parallel.groups import flatten, make_mesh

ENDS = """
import atexit, os

def threads():
    names = (open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))
    return [name for name in names if "gloo" in name]

atexit.register(lambda: print(threads()))  # after lasp's, which is registered later
import torch, torch.distributed as dist
from lasp.parallel import SequenceParallel, leave

def work():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel = SequenceParallel(dist.new_group())
    parallel.itself = parallel  # what refers to itself lives on until it is looked for
    dist.all_reduce(torch.ones(3), group=parallel.group)
    assert len(threads()) > 0

work()
leave()
print(threads())
work()
"""


def test_no_thread_of_a_group_outlives_its_process():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ENDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_every_group_of_a_mesh_waits_as_long_as_the_world(ranks):
    expected, device = comm.timeout(dist.group.WORLD), torch.get_default_device().type
    for rows in {1, ranks.size, ranks.size // 2 or 1}:
        if ranks.size % rows == 0:
            places = torch.arange(ranks.size, device="cpu").view(rows, -1)
            mesh = make_mesh(device, places, ("dp", "sp"))
            groups = [mesh["dp"].get_group(), mesh["sp"].get_group(), flatten(mesh).get_group()]
            assert [comm.timeout(group) for group in groups] == [expected] * 3
    model = Decoder(replace(tiny("linear", "L"), num_experts=2 * ranks.size))
    parallelize(model, mesh, expert_parallel=ranks.size)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    groups = [experts.run.group, *experts.gate_up_proj.device_mesh.get_all_groups()]
    assert [comm.timeout(group) for group in groups] == [expected] * 3


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.ranks(3)
def test_groups_that_some_ranks_made_alone_keep_nobody_waiting(ranks):
    """Rank 1, which is alone in its subgroup, has made fewer groups than the others."""
    world, subgroup = (ranks.groups[name] for name in ("world", "subgroup"))
    near, far = comm.split(subgroup if comm.size(subgroup) > 1 else None, 1)
    assert near is None and comm.size(far) == comm.size(subgroup)
    near, far = comm.split(world, 1)
    assert near is None and comm.size(far) == 3


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("NCCL's watchdog tells, and ends the process")
def test_a_transfer_that_others_do_not_join_says_so(ranks):
    group = dist.new_group(group_desc="pair")
    agree(group, lambda: None)  # connects
    dist.barrier()
    _set_pg_timeout(timedelta(seconds=0.5), group)
    if ranks.rank == 0 and ranks.size > 1:
        x, each = torch.ones(ranks.size, 3), [1] * ranks.size
        transfers = {
            "all_reduce": lambda: comm.all_reduce(x, group).wait(),
            "all_gather": lambda: comm.all_gather(x, group).wait(),
            "replicate": lambda: comm.replicate(x, group),
            "reduce_scatter": lambda: comm.reduce_scatter(x, group).wait(),
            "all_to_all": lambda: comm.all_to_all(x, each, each, group).wait(),
            "shift": lambda: comm.shift((x,), group).wait(),
            "send_receive": lambda: comm.send_receive(None, (x, 1), group).wait(),
            "gather_objects": lambda: comm.gather_objects(x, group),
            "broadcast": lambda: comm.broadcast(x, group),
            "agreement on an op": lambda: agree(group, lambda: None, call="an op"),
        }
        for name, transfer in transfers.items():
            where = r"^rank 0 of group 'pair', ranks \[0, 1.* of the world"
            with pytest.raises(RuntimeError, match=f"{where}: {name}.*: "):
                transfer()
    dist.barrier()
