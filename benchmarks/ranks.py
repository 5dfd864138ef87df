"""The ranks of a benchmark that torchrun starts, or one alone."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def join() -> torch.device:
    """Opens the group of all, NCCL's on GPUs, and gives this rank's device, which becomes the current one."""
    if not dist.is_initialized() and "RANK" not in os.environ:
        os.environ.update(ALONE)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if cuda else "gloo", timedelta(minutes=5)
    dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    return device


def machine() -> str:
    """As in "2 ranks, NVIDIA H200, torch 2.11.0"."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{dist.get_world_size()} ranks, {kind}, torch {torch.__version__}"


def say(*words: object, sep: str = " ") -> None:
    """On rank 0, or in the one process there is."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, sep=sep, flush=True)
