"""Times lasp's kernels beside flash-linear-attention's, PyTorch's softmax attention and the memory floor, in one run.

    python benchmarks/kernels.py                                   every op, T = 65536, 16 heads of 128, bf16
    python benchmarks/kernels.py --ops scalar --tokens 4096 65536  some ops, several lengths
    python benchmarks/kernels.py --tokens 512 1024 --in-all 65536  batches of short sequences
    python benchmarks/kernels.py --no-peer                         without flash-linear-attention (it tunes for minutes)

Medians of CUDA events, in milliseconds, as the host starts the kernels and in CUDA graphs, without host. Memory is the
peak above the inputs, in GiB; errors are relative, by norm, against the float64 reference on the first 2048 tokens. The
floor moves every input and output once at the copy bandwidth that is measured first. Log-linear attention has one q/k
head, as in Mamba-2; its steps are for the token at position 2^20 - 1, which sees 20 states, and timed without a graph.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from exchange import forward_backward
from peers import allow_wrong_gradients
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from lasp.kernels import delta_rule, linear_attention, log_linear_attention, log_linear_delta_rule
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.log_linear_step import FenwickMemory

Op = Literal[
    "none",
    "constant",
    "scalar",
    "diagonal",
    "delta",
    "gated delta",
    "diagonal delta",
    "log-linear",
    "log-linear gated delta",
]
ACCURACY_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    ops: tuple[Op, ...] = get_args(Op)
    tokens: tuple[int, ...] = (65536,)
    in_all: int | None = None  # tokens of a batch of as many such sequences; None is one sequence
    heads: int = 16
    head_dim: int = 128
    peer: bool = True  # flash-linear-attention, if it is installed
    softmax: bool = True  # PyTorch's causal attention (cuDNN), for scale
    decode_batches: tuple[int, ...] = (1, 64)  # of the steps for a single token


def draw(op: Op, tokens: int, settings: Settings) -> dict[str, Tensor]:
    """q, k, v in bf16, decay in fp32, beta in bf16; keys of unit length for the delta rule."""
    heads, size = settings.heads, settings.head_dim
    batch = 1 if settings.in_all is None else max(1, settings.in_all // tokens)
    shape = (batch, tokens, heads, size)
    of_q = (batch, tokens, 1 if op == "log-linear" else heads, size)
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in (of_q, of_q, shape))
    tensors = {"q": q, "k": F.normalize(k.float(), dim=-1).bfloat16(), "v": v}
    if "delta" in op:
        tensors["beta"] = torch.rand(shape[:3], device="cuda", dtype=torch.bfloat16)
    gate = {
        "constant": (heads,),
        "scalar": shape[:3],
        "gated delta": shape[:3],
        "diagonal": shape,
        "diagonal delta": shape,
        "log-linear": shape[:3],
        "log-linear gated delta": shape[:3],
    }
    if op in gate:
        tensors["decay"] = -0.1 * torch.rand(gate[op], device="cuda")
    if "log-linear" in op:
        tensors["level_scales"] = torch.rand(*shape[:3], (tokens - 1).bit_length() + 1, device="cuda")
    return tensors


def ours(op: Op, backend: Literal["auto", "reference", "triton"]) -> Callable[..., Tensor]:
    plain = delta_rule if "delta" in op else linear_attention
    function: Callable[..., tuple[Tensor, object]] = {
        "log-linear": log_linear_attention,
        "log-linear gated delta": log_linear_delta_rule,
    }.get(op, plain)
    return lambda **tensors: function(**tensors, backend=backend)[0]


def theirs(op: Op) -> Callable[..., Tensor] | None:
    """flash-linear-attention's function for this op, with lasp's argument names; for its time only: see peers."""
    try:
        import fla.ops as fla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.log_linear_attn import chunk_log_linear_attn
    except ImportError:
        return None
    allow_wrong_gradients()
    calls = {
        "none": lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False),
        "constant": lambda q, k, v, decay: fla.chunk_simple_gla(q, k, v, g_gamma=decay),
        "scalar": lambda q, k, v, decay: fla.chunk_simple_gla(q, k, v, g=decay),
        "diagonal": lambda q, k, v, decay: fla.chunk_gla(q, k, v, g=decay),
        "delta": lambda q, k, v, beta: fla.chunk_delta_rule(q, k, v, beta=beta),
        "gated delta": lambda q, k, v, beta, decay: fla.chunk_gated_delta_rule(q, k, v, g=decay, beta=beta),
        "diagonal delta": lambda q, k, v, beta, decay: fla.chunk_kda(q, k, v, g=decay, beta=beta),
        "log-linear": lambda q, k, v, decay, level_scales: chunk_log_linear_attn(q, k, v, decay, level_scales),
    }
    if op not in calls:
        return None
    return lambda **tensors: calls[op](**tensors)[0]


def softmax(q: Tensor, k: Tensor, v: Tensor, **_: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def measure(function: Callable[..., Tensor], tensors: dict[str, Tensor], graph: bool = False) -> list[str]:
    """Milliseconds forward, forward + backward and, if wanted, both from CUDA graphs; GiB at the peak; seconds until
    the first result."""
    torch.cuda.empty_cache()  # pieces of larger blocks, from measurements before, may lie on other pages
    both = forward_backward(function, tensors)
    start = time.perf_counter()
    both()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30

    def timed(how: Callable[..., float]) -> list[str]:
        with torch.no_grad():
            forward = how(lambda: function(**tensors), return_mode="median")
        return [f"{forward:.3f}", f"{how(both, return_mode='median'):.3f}"]

    replayed = timed(do_bench_cudagraph) if graph else ["", ""]
    return [*timed(do_bench), *replayed, f"{peak:.2f}", f"{first:.1f}"]


def accuracy(op: Op, settings: Settings) -> str:
    """The largest relative error of lasp's output and gradients."""
    tensors = draw(op, ACCURACY_TOKENS, replace(settings, in_all=None))
    do = torch.randn_like(tensors["v"])

    def run(cast: Callable[[Tensor], Tensor], backend: Literal["auto", "reference", "triton"]) -> list[Tensor]:
        leaves = {name: cast(x).clone().requires_grad_(x.ndim > 1) for name, x in tensors.items()}
        o = ours(op, backend)(**leaves)
        return [o, *torch.autograd.grad(o, [x for x in leaves.values() if x.requires_grad], cast(do))]

    pairs = zip(run(lambda x: x, "triton"), run(Tensor.double, "reference"), strict=True)
    return f"{max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs):.1e}"


def decode(op: Op, batch: int, settings: Settings) -> str:
    """Microseconds of a step for a single token in each of `batch` sequences, from a CUDA graph."""
    if "log-linear" in op:
        return decode_log_linear(op, batch, settings)
    rows = draw(op, batch, replace(settings, in_all=None))
    tensors = {name: x if x.ndim == 1 else x.transpose(0, 1) for name, x in rows.items()}
    state = torch.zeros(batch, settings.heads, settings.head_dim, settings.head_dim, device="cuda")
    function = delta_rule if "delta" in op else linear_attention
    with torch.no_grad():
        time_ms = do_bench_cudagraph(
            lambda: function(**tensors, initial_state=state, output_final_state=True, backend="triton"),
            return_mode="median",
        )
    return f"{time_ms * 1e3:.1f}"


def decode_log_linear(op: Op, batch: int, settings: Settings, seen: int = 2**20 - 1) -> str:
    rows = draw(op, batch, replace(settings, in_all=None))
    tensors = {name: x.transpose(0, 1) for name, x in rows.items()}
    levels = seen.bit_length()
    tensors["level_scales"] = torch.rand(batch, 1, settings.heads, levels + 1, device="cuda")
    state = torch.zeros(batch, levels, settings.heads, settings.head_dim, settings.head_dim, device="cuda")
    memory = FenwickMemory(FenwickState(state, torch.full((batch,), seen)))

    def step() -> None:
        memory.tokens.fill_(seen)
        memory.step(**tensors)

    return f"{do_bench(step, return_mode='median') * 1e3:.1f}"


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(2**30, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3)


def floor(tensors: dict[str, Tensor], bandwidth: float) -> list[str]:
    """Forward reads the inputs and writes o; backward reads them and do, and writes their gradients."""
    inputs, output = sum(x.nbytes for x in tensors.values()), tensors["v"].nbytes
    times = ((inputs + output) / bandwidth * 1e3, (3 * inputs + 2 * output) / bandwidth * 1e3)
    return [f"{t:.3f}" for t in times]


def main(settings: Settings) -> None:
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    console = Console(width=120)
    console.print(f"{properties.name}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, ", end="")
    console.print(f"{settings.heads} heads of {settings.head_dim}, bf16")
    times = ("forward", "+ backward", "graph: forward", "+ backward")
    table = Table("op", "tokens", "by", *times, "peak GiB", "first call s", "error")
    for op in settings.ops:
        for tokens in settings.tokens:
            tensors = draw(op, tokens, settings)
            table.add_row(op, str(tokens), "floor", *floor(tensors, bandwidth))
            table.add_row("", "", "lasp", *measure(ours(op, "triton"), tensors, graph=True), accuracy(op, settings))
            if settings.peer and (peer := theirs(op)):
                table.add_row("", "", "fla", *measure(peer, tensors))
    if settings.softmax:
        for tokens in settings.tokens:
            table.add_row("softmax", str(tokens), "cuDNN", *measure(softmax, draw("none", tokens, settings)))
    console.print(table)
    columns = (f"batch {batch}" for batch in settings.decode_batches)
    steps = Table("one token, microseconds", *columns)
    for op in settings.ops:
        steps.add_row(op, *(decode(op, batch, settings) for batch in settings.decode_batches))
    console.print(steps)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
