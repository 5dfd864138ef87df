"""What the kernels ask of a device, and which tensors they take."""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.runtime import driver

MAX_HEAD = 256
ROOMY = 160 * 2**10  # bytes of shared memory, as on A100 and H100
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOPPER_HEAD = 128  # the size of heads that the scans for Hopper serve
GLUON = triton.__version__.startswith("3.6.")  # they are in its experimental language, and have run with this version


# Triton's own two, made to work in kernels, too, take 5 µs of the host.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_of(size: int) -> int:
    """The power of two that holds a head size, 64 at least: on Hopper Triton 3.6 miscompiles products of 16 columns,
    and some of 32 read beside shared memory."""
    return max(64, next_power_of_2(size))


def warps_of(*sizes: int) -> int:
    """Of a program whose products have 64 rows and a block of columns for each of these head sizes: two groups of four
    warps halve the columns, which must not leave 16 (see block_of)."""
    return 8 if min(map(block_of, sizes)) >= 64 else 4


def for_hopper(k: Tensor, v: Tensor) -> bool:
    """Whether vector gates have kernels for Hopper, with such tensors. "meta" stands for the current GPU."""
    return on_hopper(v) and k.shape[-1] == v.shape[-1] == HOPPER_HEAD and v.dtype == torch.bfloat16


def on_hopper(x: Tensor) -> bool:
    """Whether kernels for Hopper can run where x is."""
    return GLUON and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    """ "meta" stands for the current GPU."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None) == (9, 0)


@cache
def is_roomy(device: torch.device) -> bool:
    """Whether a program on this GPU may have enough shared memory for the largest heads; "meta" stands for the current
    one. Without any it may."""
    if not torch.cuda.is_available():
        return True
    index = device.index if device.type == "cuda" else torch.cuda.current_device()
    return driver.active.utils.get_device_properties(index)["max_shared_mem"] >= ROOMY


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; "meta" stands for the current one. Without any it is one."""
    if not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(device if device.type == "cuda" else None).multi_processor_count


def unsupported(k: Tensor, v: Tensor) -> str | None:
    """Why the Triton backend cannot take these tensors, if it cannot."""
    if v.dtype not in DTYPES:
        return f"{v.dtype}: Triton takes bfloat16, float16 and float32"
    if max(k.shape[-1], v.shape[-1]) > MAX_HEAD:
        return f"head sizes K = {k.shape[-1]}, V = {v.shape[-1]}: Triton takes at most {MAX_HEAD}"
    if v.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"a tensor on {v.device}: Triton takes tensors on a GPU"
    return None
