"""Process start-up: which rank this is, its device, the process group, the mesh, from the environment."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lasp.config import ModelConfig, ParallelConfig, TrainConfig, require
from lasp.launched import end_with_launcher
from lasp.parallel import SequenceParallel
from lasp.parallel.groups import leave, make_cpu_group, make_mesh
from lasp.training.same_run import require_same_on_ranks, settings
from lasp.training.together import together


class Joining(Protocol):
    """What is to be run: a dataclass whose settings are the same on all ranks."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def allow_changed(self) -> tuple[str, ...]: ...
    def mesh_shape(self, world_size: int) -> tuple[int, int]:
        """(data-parallel, sequence-parallel) ranks; ValueError if it does not fit such a world."""
        ...


@dataclass(kw_only=True)
class World:
    """This process's place among the ranks. The mesh's axes are "dp" and "sp", an SP group's ranks being neighbours.

    local_size: how many of the ranks share this machine.
    hosts: all ranks once more, on CPUs, for messages that wait for no GPU.
    saves: the same for the messages of saving and loading, which have a time limit of their own.
    doing: what the run is at, for the note that an error gets.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    local_size: int = 1
    hosts: dist.ProcessGroup | None = None
    saves: dist.ProcessGroup | None = None
    doing: str = "its start"

    def __post_init__(self) -> None:
        self.hosts = self.hosts or dist.group.WORLD


def sequence_parallel(config: ParallelConfig, model: ModelConfig, world: World) -> SequenceParallel:
    """This rank's part in its group of those that share a context of the model's."""
    return SequenceParallel(
        world.mesh["sp"].get_group(),
        layout=config.layout,
        state_exchange=config.state_exchange,
        softmax=config.softmax,
        aligned=model.aligned,
        device=world.device,
    )


def take_gpu(number: int) -> None:
    """A process that no launcher started has one of the machine's to itself, as a rank of torchrun's has."""
    os.environ["LOCAL_RANK"] = str(number)


@contextmanager
def join_world(config: Joining) -> Iterator[World]:
    """Joins the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), or is a world of one.

    A process group that exists already is used, and left as it is. Raises ValueError on every rank if the run does not
    fit the world or the machine, or if ranks were given different settings.
    """
    end_with_launcher()
    exists = dist.is_initialized()
    rank = dist.get_rank() if exists else int(os.environ.get("RANK", 0))
    size = dist.get_world_size() if exists else int(os.environ.get("WORLD_SIZE", 1))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = _device(config.device, int(os.environ.get("LOCAL_RANK", 0)), local_size)
    if device.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: the host has little to compute
    if not exists:
        if device.type == "cuda" and (run_dir := getattr(config, "run_dir", None)) is not None:
            _record_flights(run_dir)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.parallel.timeout),
            rank=rank,
            world_size=size,
            store=dist.HashStore() if size == 1 else None,
            device_id=device if device.type == "cuda" else None,
        )
    world = None
    try:
        require_same_on_ranks(together(dist.group.WORLD, lambda: settings(config)))
        mesh_shape = config.mesh_shape(size)
        mesh = make_mesh(device.type, torch.arange(size, device="cpu").view(mesh_shape), ("dp", "sp"))
        saves = make_cpu_group(config.checkpoint_timeout) if isinstance(config, TrainConfig) else None
        hosts = make_cpu_group(config.parallel.timeout) if device.type == "cuda" and size > 1 else None
        world = World(rank=rank, size=size, device=device, mesh=mesh, local_size=local_size, hosts=hosts, saves=saves)
        yield world
    except BaseException as error:
        error.add_note(f"on rank {rank} of {size}, during {world.doing if world else 'its start'}")
        run_dir = getattr(config, "run_dir", None)
        if run_dir is not None and isinstance(error, Exception):
            _keep_traceback(error, run_dir, rank)
        if not exists:
            dist.destroy_process_group()  # the others may never come
        raise
    if not exists:
        leave()
    else:
        for group in filter(None, (hosts, saves)):
            dist.destroy_process_group(group)


def _device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    """`auto` takes GPUs if every rank of this machine can have its own, and CPUs otherwise."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus < local_size):
        return torch.device("cpu")
    require(gpus >= local_size, "device", wanted, f"a GPU for each of this machine's {local_size} ranks; it has {gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def ranks_folder(run_dir: str | Path) -> Path:
    """Where the ranks of a run leave word of themselves."""
    folder = Path(run_dir) / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keep_traceback(error: BaseException, run_dir: str, rank: int) -> None:
    """In a file, for what is said of an error takes a line."""
    with suppress(OSError):
        file = ranks_folder(run_dir) / f"traceback-{rank}.txt"
        file.write_text("".join(traceback.format_exception(error)))
        error.add_note(f"(traceback: {file})")


def _record_flights(run_dir: str) -> None:
    """Has NCCL keep its last messages, and write them down where one runs out of time, unless told otherwise."""
    trace = str(ranks_folder(run_dir) / "nccl-trace-")
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),  # messages
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", trace),  # and the rank
    ):
        os.environ.setdefault(name, value)
