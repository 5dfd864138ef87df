"""How much memory a rank has taken, and for what."""

import resource
import sys

import torch
from torch import Tensor, nn

from lasp.parallel.shards import local_part

GIB = 2**30


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at once: of the GPU's memory, on CPUs of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_by_part(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, int]:
    """Bytes of this rank's shares of weights, their gradients and the optimiser's states, and the rest of the peak:
    activations and buffers; on CPUs the libraries, too."""
    weights = [local_part(parameter) for parameter in model.parameters()]
    states = [
        local_part(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    parts = {
        "weights": sum(map(_size, weights)),
        "gradients": sum(_size(local_part(p)) for p in model.parameters() if p.requires_grad),
        "optimizer": sum(map(_size, states)),
    }
    return parts | {"rest": peak_memory(device) - sum(parts.values())}


def describe_memory(parts: dict[str, int]) -> str:
    """In a line."""
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"memory of rank 0 at its peak, GiB: {told}; in all {sum(parts.values()) / GIB:.2f}"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
