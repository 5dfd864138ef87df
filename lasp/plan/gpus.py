"""What a plan has to know of a GPU: of those that are listed, or of the one that is here, measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lasp.config import require
from lasp.plan.host import available_bytes

GIB = 2**30
HERE = "here"
COPY = 0.9  # of a memory's stated bandwidth is what copies reach: 4.3 of 4.8 TB/s on an H200, 3.03 of 3.35 on an H100
MATMUL = 0.71  # of its dense peak are large products of matrices on an H200
PCIE_4, PCIE_5 = 25e9, 50e9


@dataclass(frozen=True)
class GPU:
    """memory: bytes, as PyTorch tells them. flops: dense bf16 a second, as the vendor states them. bandwidth: bytes a
    second that a copy reads and writes. link: bytes a second to or from pinned memory of the host. host: bytes of that
    memory for each GPU; of those that are listed, what servers with them usually have."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    host: float

    @property
    def usable(self) -> float:
        """Bytes for tensors: the rest is CUDA's and NCCL's, or lies between tensors."""
        return 0.96 * self.memory - GIB


def _gpu(name: str, gib: float, tera_flops: float, tb_per_second: float, link: float, host_gib: int = 224) -> GPU:
    return GPU(name, gib * GIB, tera_flops * 1e12, COPY * tb_per_second * 1e12, link, host_gib * GIB)


# By what a device's name has in it: the first that fits, so a longer name stands before a part of it.
_DEVICES = {
    "H100 PCIe": [_gpu("H100-PCIe", 79.2, 756, 2.04, PCIE_5)],
    "H100 NVL": [_gpu("H100-NVL", 93.1, 835, 3.94, PCIE_5)],
    "H100": [_gpu("H100", 79.2, 989, 3.35, PCIE_5)],
    "H200": [_gpu("H200", 139.8, 989, 4.8, PCIE_5)],
    "B200": [_gpu("B200", 178.4, 2250, 8.0, PCIE_5)],
    "A100": [_gpu("A100-80", 79.2, 312, 2.039, PCIE_4), _gpu("A100-40", 39.4, 312, 1.555, PCIE_4, 112)],
    "L40S": [_gpu("L40S", 44.4, 362, 0.864, PCIE_4, 56)],
    "RTX 4090": [_gpu("RTX-4090", 23.5, 165.2, 1.008, PCIE_4, 56)],
    "RTX 5090": [_gpu("RTX-5090", 31.3, 209.5, 1.792, PCIE_5, 56)],
}
GPUS = {gpu.name: gpu for gpus in _DEVICES.values() for gpu in gpus}


def named(name: str) -> GPU:
    """The listed GPU of that name, or the one that is "here". ValueError for another name, or if there is none here."""
    if name == HERE:
        return measured()
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        require(False, "gpu", name, f"{HERE}, or one of {', '.join(GPUS)}")
    assert found is not None
    return found


def of_name(device_name: str, memory: float | None = None) -> GPU | None:
    """The listed GPU that a device's name tells, of several that whose memory is nearest; None for an unknown one."""
    gpus = next((gpus for part, gpus in _DEVICES.items() if part in device_name), None)
    if gpus is None:
        return None
    gpu = gpus[0] if memory is None else min(gpus, key=lambda gpu: abs(gpu.memory - memory))
    return gpu if memory is None else replace(gpu, memory=memory)


def of_device(device: torch.device) -> GPU:
    """The GPU of a CUDA device, with its own memory and its share of what the host has left; one that is not listed is
    taken to be as fast as an A100."""
    properties = torch.cuda.get_device_properties(device)
    memory = float(properties.total_memory)
    gpu = of_name(properties.name, memory) or replace(GPUS["A100-80"], name=properties.name, memory=memory)
    return replace(gpu, host=_host() or gpu.host)


def _host() -> float | None:
    left = available_bytes()
    return None if left is None else left / torch.cuda.device_count()


def measured() -> GPU:
    """The GPU that is here: its memory, the speed of its copies, and the peak that its products hint at."""
    require(torch.cuda.is_available(), "gpu", HERE, f"a GPU, or one of {', '.join(GPUS)}")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    host = torch.empty(size, size, dtype=torch.bfloat16, pin_memory=True)
    number = 2 * size**2  # bytes of each
    return GPU(
        properties.name,
        float(properties.total_memory),
        2 * size**3 / _seconds(lambda: torch.mm(a, b)) / MATMUL,
        2 * number / _seconds(lambda: a.copy_(b)),
        number / _seconds(lambda: host.copy_(a, non_blocking=True)),
        _host() or GPUS["A100-80"].host,
    )


def _seconds(call: Callable[[], object], times: int = 20) -> float:
    """Of one call, as the GPU counts them."""
    for _ in range(3):
        call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3 / times
