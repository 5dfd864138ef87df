"""How kernels are launched: a small table keyed on head size and dtype, never on the length of a sequence."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

MAX_HEAD = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HOPPER_HEAD = 128  # the size of heads that the walks for Hopper serve
GLUON = triton.__version__.startswith("3.6.")  # they are in its experimental language, and have run with this version
LONGEST_TILE, SHORTEST_TILE = 8192, 64


@dataclass(frozen=True)
class Config:
    """chunk: tokens per step of a walk. widest: columns of the state that one program of a walk holds.

    reach: the largest decay of a chunk, as a power of two, that is not steep (see walk): 2^{reach/2} must leave room in
    the dtype, and its exponent's rounding must not show in fp32.
    """

    chunk: int
    warps: int
    stages: int
    widest: int
    state_stages: int = 3
    reach: float = 160.0
    precision: str = "tf32"  # of products in fp32, where states meet fp16 inputs


# Triton's own two, made to work in kernels, too, take 5 µs of the host.


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_of(size: int) -> int:
    """The power of two that holds a head size, 32 at least: Triton 3.6 miscompiles products of 16 columns (Hopper)."""
    return max(32, next_power_of_2(size))


def config_for(k: Tensor, v: Tensor, gated: bool) -> Config:
    """The configuration of the scalar classes' kernels for these head sizes and dtype."""
    widest = max(k.shape[-1], v.shape[-1])
    if v.dtype == torch.float32:
        return Config(chunk=32, warps=8, stages=1, widest=64, state_stages=1, reach=32.0, precision="ieee")
    reach = 16.0 if v.dtype == torch.float16 else 160.0
    if widest > 128:
        return Config(chunk=64, warps=8, stages=1, widest=64, reach=reach)
    if widest > 64 and not gated:
        return Config(chunk=128, warps=8, stages=2, widest=128)
    return Config(chunk=64, warps=4, stages=2, widest=64, reach=reach)


def for_hopper(k: Tensor, v: Tensor) -> bool:
    """Whether walks of such tensors have kernels for Hopper. On "meta", which stands for the current GPU, too."""
    served = k.shape[-1] == v.shape[-1] == HOPPER_HEAD and v.dtype == torch.bfloat16
    there = v.device.type != "cpu" and torch.cuda.is_available()
    return GLUON and served and there and torch.cuda.get_device_capability() == (9, 0)


def tile_length(sequences: int, tokens: int, heads: int, device: torch.device) -> int:
    """Tokens per tile: as many tiles as the multiprocessors walk at once, a program each, or so many times as many that
    they are not too long.

    One tile more would be walked alone when all others are done. Sequences of so many tokens share no tiles. Offsets
    within a tile fit into 32 bits.
    """
    addressable = 2**31 // (heads * MAX_HEAD * SHORTEST_TILE) * SHORTEST_TILE
    longest, at_once = min(LONGEST_TILE, addressable), multiprocessors(device)
    rounds = cdiv(sequences * tokens * heads, longest * at_once)
    most = max(1, rounds * at_once // heads // sequences)
    return min(longest, cdiv(tokens, most * SHORTEST_TILE) * SHORTEST_TILE)


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
