"""Process groups from their beginning to their end: meshes whose groups wait no longer than the world, and leaving."""

import atexit
import gc
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from lasp.parallel import comm

PATIENCE = 10.0  # seconds, at a process's end


def make_mesh(device_type: str, ranks: Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh with these axes. Collective."""
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names)
    for name in names:
        wait_as_long_as_the_world(mesh.get_group(name))
    return mesh


def make_cpu_group(timeout: float) -> dist.ProcessGroup | None:
    """All ranks once more, on CPUs, with a timeout of their own in seconds. Collective."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="on CPUs")


def flatten(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of a mesh along one axis; made once per mesh. Collective."""
    if mesh.ndim == 1:
        return mesh
    flat = mesh._flatten("_".join(mesh.mesh_dim_names or ()))
    wait_as_long_as_the_world(flat.get_group())
    return flat


def wait_as_long_as_the_world(*groups: dist.ProcessGroup) -> None:
    """Gives groups the timeout of the default one. PyTorch gives its own to groups that are made without one."""
    assert dist.group.WORLD is not None
    for group in groups:
        _set_pg_timeout(timedelta(seconds=comm.timeout(dist.group.WORLD)), group)


def leave() -> None:
    """Ends this process's groups, once every rank of the world has come here."""
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()


@atexit.register
def _end() -> None:
    """Ends gloo's groups before Python ends. A thread of theirs may still be about to drop the last message, whose
    tensors are Python's, and that aborts a process in which Python is ending. A group joins its threads when nobody
    refers to it any more; for threads of other groups this waits until they sleep."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    gc.collect()
    deadline, quiet = time.monotonic() + PATIENCE, 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(1e-3)  # a thread that waits for Python's lock gets it, and is seen running
        quiet = 0 if "R" in _states_of_gloo() else quiet + 1


def _states_of_gloo() -> list[str]:
    """Of its threads for messages: "R" that of one that runs or could run; nothing where there is no /proc."""
    states = []
    for thread in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has ended
            name, _, rest = thread.read_text().rpartition(")")
            if "pt_gloo" in name:
                states.append(rest.split()[0])
    return states
