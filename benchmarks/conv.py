"""Times a layer's short convolution, with SiLU and what follows, beside the same compiled by PyTorch and the floor.

    python benchmarks/conv.py                     65,536 tokens, 16 heads of 128, width 4, bf16
    python benchmarks/conv.py --tokens 8192 --peer       and beside flash-linear-attention's, if it is installed

delta: q, k of unit length and v; mamba2: x, B and C. Medians of CUDA graphs, in milliseconds, forward and with
backward; memory is the peak above the inputs, in GiB. The floor reads and writes every input, output and gradient once
at the copy bandwidth that is measured first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from kernels import copy_bandwidth
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench_cudagraph

from lasp.kernels import short_conv
from lasp.kernels.parts import Part, Parts, activate


@dataclass(frozen=True, kw_only=True)
class Settings:
    tokens: int = 65536
    heads: int = 16
    head_dim: int = 128
    width: int = 4
    peer: bool = False  # flash-linear-attention


def compiled(parts: Parts) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The definition, shifted rows added up in fp32, as torch.compile fuses it."""

    def definition(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rows, width = F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight.shape[1]
        shifted = (rows[:, i : i + x.shape[1]].float() * weight[:, i].float() for i in range(width))
        return activate(sum(shifted, torch.zeros((), device=x.device)).to(x.dtype), True, parts)

    return torch.compile(definition)


def peer(parts: Parts) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    from fla.modules.convolution import causal_conv1d
    from fla.modules.l2norm import l2norm

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y, *_ = causal_conv1d(x, weight, activation="silu")
        rows = y.unflatten(-1, (parts.heads, -1)).split([part.size for part in parts.parts], dim=-1)
        return tuple(
            l2norm(z.contiguous()) if part.unit_length else z.contiguous()
            for z, part in zip(rows, parts.parts, strict=True)
        )

    return call


def measure(function: Callable[..., tuple[Tensor, ...]], x: Tensor, weight: Tensor) -> list[str]:
    leaves = [y.detach().requires_grad_() for y in (x, weight)]
    upstream = [torch.randn_like(y) for y in function(*leaves)]

    def both() -> None:
        torch.autograd.grad(function(*leaves), leaves, upstream)

    both()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.no_grad():
        forward = do_bench_cudagraph(lambda: function(*leaves), return_mode="median")
    return [f"{forward:.3f}", f"{do_bench_cudagraph(both, return_mode='median'):.3f}", f"{peak:.2f}"]


def main(settings: Settings) -> None:
    size, heads, bandwidth = settings.head_dim, settings.heads, copy_bandwidth()
    key = Part(size, unit_length=True)
    cases = {
        "delta": Parts(heads, (key, key, Part(size))),
        "mamba2": Parts(1, (Part(heads * size), Part(size), Part(size))),
    }
    console = Console(width=100)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    table = Table("layer", "by", "forward", "+ backward", "peak GiB")
    for name, parts in cases.items():
        x = torch.randn(1, settings.tokens, parts.channels, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(parts.channels, settings.width, device="cuda", dtype=torch.bfloat16)
        table.add_row(name, "floor", *(f"{passes * x.nbytes / bandwidth * 1e3:.3f}" for passes in (2, 5)), "")
        ours = lambda x, weight, parts=parts: short_conv(x, weight, None, parts)  # noqa: E731
        table.add_row("", "lasp", *measure(ours, x, weight))
        table.add_row("", "torch.compile", *measure(compiled(parts), x, weight))
        if settings.peer:
            table.add_row("", "fla", *measure(peer(parts), x, weight))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
