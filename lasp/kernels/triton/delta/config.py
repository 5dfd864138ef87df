"""How the delta rule's kernels are launched, by head size and dtype."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.triton.device import block_of, cdiv, on_hopper

HOPPER_HEADS = 64, 128, 256
# What the scans over chunks are for.
SUMMARY, TRANSITION, OUTPUTS, STATES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@dataclass(frozen=True)
class Launch:
    """block: columns of V (of K in `gradients`) that a program holds at most; block_v: rows there, of V."""

    block: int
    warps: int
    stages: int
    block_v: int = 128

    def at_once(self, size: int, processors: int) -> int:
        """How many scans of states with so many columns run at a time: what 8 warps hold fills a multiprocessor."""
        return processors * (1 if self.warps == 8 else 2) // cdiv(size, self.block)


@dataclass(frozen=True)
class DeltaConfig:
    """One launch per kernel; states: forward scans but for outputs. precision: of products of fp32 numbers.

    For a diagonal decay: the block of `factors` is of K. max_ln_decay: the largest decay within 16 tokens whose scores
    are products, bounded by the size of e^max_ln_decay, in fp32 by rounding. sums_by_products: sums of gates on the
    matrix units.
    """

    states: Launch
    outputs: Launch
    reverse: Launch
    gradients: Launch
    factors: Launch
    precision: str
    max_ln_decay: float
    sums_by_products: bool


def delta_config(k: Tensor, v: Tensor, gated: bool, diagonal: bool) -> DeltaConfig:
    """From a table, never from the length of a sequence."""
    return _config(block_of(max(k.shape[-1], v.shape[-1])), v.dtype, gated, diagonal)


@cache
def _config(widest: int, dtype: torch.dtype, gated: bool, diagonal: bool) -> DeltaConfig:
    if dtype == torch.bfloat16 or (dtype == torch.float16 and not diagonal):
        stages = 2 if diagonal else 3
        narrow, factors = Launch(64, warps=4, stages=stages), Launch(32, warps=4, stages=2)
        wide = Launch(128, warps=8, stages=stages) if widest == 128 else narrow
        gradients = Launch(16, warps=4, stages=1) if diagonal else Launch(32, warps=4, stages=3 if gated else 2)
        if widest > 128:
            narrow = wide = Launch(64, warps=8, stages=1)
            # All of V at once: of several blocks in 16 bits, Triton 3.6's code for Hopper reads beyond shared memory.
            gradients = Launch(gradients.block, warps=8, stages=1, block_v=256)
        return DeltaConfig(narrow if diagonal else wide, wide, wide, gradients, factors, "tf32", 64.0, True)
    scans = Launch(64 if widest <= 128 else 32, warps=4 if widest <= 64 else 8, stages=1)
    gradients, factors = Launch(32, warps=8, stages=1, block_v=64), Launch(32, warps=8, stages=1)
    return DeltaConfig(scans, scans, scans, gradients, factors, "tf32x3", 16.0, False)


@dataclass(frozen=True)
class HopperLaunch:
    """A program for Hopper holds `columns` of V, one of a head's `parts`; a multiprocessor runs `programs` at once.

    tight: a chunk takes so much of the shared memory that fewer are fetched ahead. All fit into 227 KiB, or half of it.
    """

    columns: int
    parts: int
    programs: int
    warps: int
    tight: bool

    @classmethod
    @cache
    def of(cls, key_dim: int, value_dim: int) -> "HopperLaunch":
        wide, columns = key_dim > 128, 64 if key_dim > 128 or value_dim % 128 else 128
        programs, warps = 2 if key_dim == columns == 64 else 1, columns // 16 * (2 if wide else 1)
        return cls(columns, value_dim // columns, programs, warps, tight=wide or programs == 2)

    @cached_property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps} | ({"maxnreg": 128} if self.programs == 2 else {})

    def stages(self, mode: tl.constexpr) -> int:
        return 2 if self.tight and mode is OUTPUTS else 3

    def reverse_stages(self, gradients: bool) -> int:
        return 3 - self.tight - gradients


def has_hopper_kernels(x: DeltaInputs) -> bool:
    """Whether scans of such tensors have kernels for Hopper.

    The state and its gradient are fp32, but go into products with 16 bits. fp16 needs no scale for that: with keys of
    unit length an entry of the state is a few times as large as v's, and outputs and gradients, which fp16 has to hold
    in any case, are about as large as what they are made of. Beyond 65,504 they are not finite, as gradient scalers
    expect.
    """
    return (
        x.k.shape[-1] in HOPPER_HEADS
        and x.v.shape[-1] in HOPPER_HEADS
        and x.v.dtype in (torch.bfloat16, torch.float16)
        and scan_decay(x.decay) != Decay.DIAGONAL
        and on_hopper(x.v)
    )


def scan_decay(decay: Tensor | None) -> Decay:
    """Of the scans over chunks: a constant decay is a scalar gate to them."""
    kind = Decay.of(decay)
    return Decay.SCALAR if kind == Decay.CONSTANT else kind
