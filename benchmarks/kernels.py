"""Times lasp's kernels beside flash-linear-attention's, PyTorch's softmax attention and the memory floor, in one run.

    python benchmarks/kernels.py                                   every op, T = 65536, 16 heads of 128, bf16
    python benchmarks/kernels.py --ops scalar --tokens 4096 65536  some ops, several lengths
    python benchmarks/kernels.py --tokens 512 1024 --in-all 65536  batches of short sequences
    python benchmarks/kernels.py --shapes models                   heads as models have them (shapes.py)
    python benchmarks/kernels.py --no-peer                         without flash-linear-attention (it tunes for minutes)

Medians of CUDA events, in milliseconds, as the host starts the kernels and in CUDA graphs, without host; and the host's
time until a call and its backward have been started, the GPU being idle before. Memory is the peak above the inputs, in
GiB; errors are relative, by norm, against the float64 reference on the first 2048 tokens. The floor moves every input
and output once at the copy bandwidth that is measured first. Log-linear attention has one q/k head, as in Mamba-2; its
steps are for the tokens at positions 2^10 - 1 and 2^20 - 1, which see 10 and 20 states, and timed without a graph.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from exchange import forward_backward
from peers import allow_wrong_gradients
from rich.console import Console
from rich.table import Table
from shapes import MODELS, Op, Shape
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from lasp.kernels import delta_rule, linear_attention, log_linear_attention, log_linear_delta_rule
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.log_linear_step import FenwickMemory

ACCURACY_TOKENS = 2048
STARTS = 200  # of a call, of which the host's time is the median
SEEN = 2**10 - 1, 2**20 - 1  # tokens before a step of log-linear attention: all of the bits are set


@dataclass(frozen=True, kw_only=True)
class Settings:
    shapes: Literal["equal", "models"] = "equal"  # heads: as the next options say, or as models have them
    ops: tuple[Op, ...] = get_args(Op)
    tokens: tuple[int, ...] = (65536,)
    in_all: int | None = None  # tokens of a batch of as many such sequences; None is one sequence
    heads: int = 16
    head_dim: int = 128
    peer: bool = True  # flash-linear-attention, if it is installed
    softmax: bool = True  # PyTorch's causal attention (cuDNN), for scale
    decode_batches: tuple[int, ...] = (1, 64)  # of the steps for a single token


def draw(shape: Shape, batch: int, tokens: int) -> dict[str, Tensor]:
    """q, k, v and beta in the shape's dtype, decay in fp32; keys of unit length for the delta rule."""
    dtype, rows = getattr(torch, shape.dtype), (batch, tokens, shape.heads)
    q, k = (torch.randn(batch, tokens, shape.q_heads, shape.key_dim, device="cuda", dtype=dtype) for _ in range(2))
    v = torch.randn(*rows, shape.value_dim, device="cuda", dtype=dtype)
    tensors = {"q": q, "k": F.normalize(k.float(), dim=-1).to(dtype), "v": v}
    if "delta" in shape.op:
        tensors["beta"] = torch.rand(rows, device="cuda", dtype=dtype)
    per_channel = (*rows, shape.key_dim)
    gate = {
        "constant": (shape.heads,),
        "scalar": rows,
        "gated delta": rows,
        "diagonal": per_channel,
        "diagonal delta": per_channel,
        "log-linear": rows,
        "log-linear gated delta": rows,
    }
    if shape.op in gate:
        tensors["decay"] = -0.1 * torch.rand(gate[shape.op], device="cuda")
    if "log-linear" in shape.op:
        tensors["level_scales"] = torch.rand(*rows, (tokens - 1).bit_length() + 1, device="cuda")
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
    """Milliseconds forward, forward + backward, of the host, and, if wanted, from CUDA graphs; GiB at the peak; seconds
    until the first result."""
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
    return [*timed(do_bench), f"{host(both):.3f}", *replayed, f"{peak:.2f}", f"{first:.1f}"]


def host(call: Callable[[], object]) -> float:
    """Milliseconds until a call returns that has the GPU for itself."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return median(once() for _ in range(STARTS)) * 1e3


def accuracy(shape: Shape) -> str:
    """The largest relative error of lasp's output and gradients."""
    tensors = draw(shape, 1, ACCURACY_TOKENS)
    do = torch.randn_like(tensors["v"])

    def run(cast: Callable[[Tensor], Tensor], backend: Literal["auto", "reference", "triton"]) -> list[Tensor]:
        leaves = {name: cast(x).clone().requires_grad_(x.ndim > 1) for name, x in tensors.items()}
        o = ours(shape.op, backend)(**leaves)
        return [o, *torch.autograd.grad(o, [x for x in leaves.values() if x.requires_grad], cast(do))]

    pairs = zip(run(lambda x: x, "triton"), run(Tensor.double, "reference"), strict=True)
    return f"{max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs):.1e}"


def decode(shape: Shape, batch: int) -> str:
    """Microseconds of a step for a single token in each of `batch` sequences, from a CUDA graph."""
    tensors = draw(shape, batch, 1)
    state = torch.zeros(batch, shape.heads, shape.key_dim, shape.value_dim, device="cuda")
    function = delta_rule if "delta" in shape.op else linear_attention
    with torch.no_grad():
        time_ms = do_bench_cudagraph(
            lambda: function(**tensors, initial_state=state, output_final_state=True, backend="triton"),
            return_mode="median",
        )
    return f"{time_ms * 1e3:.1f}"


def decode_log_linear(shape: Shape, batch: int, seen: int) -> str:
    """The same behind so many tokens."""
    tensors, levels = draw(shape, batch, 1), seen.bit_length()
    tensors["level_scales"] = torch.rand(batch, 1, shape.heads, levels + 1, device="cuda")
    state = torch.zeros(batch, levels, shape.heads, shape.key_dim, shape.value_dim, device="cuda")
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


def models(tokens: int, bandwidth: float, console: Console) -> None:
    """The table of shapes: forward and backward from CUDA graphs, memory, and times the floor."""
    table = Table("heads x K/V", "forward", "+ backward", "goal", "x floor", "peak GiB", "x inputs", "first s", "error")
    for shape in MODELS:
        tensors = draw(shape, 1, tokens)
        inputs = sum(x.nbytes for x in tensors.values()) / 2**30
        (_, both), least = floor(tensors, bandwidth), shape.goal
        *_, forward, backward, peak, first = measure(ours(shape.op, "auto"), tensors, graph=True)
        table.add_row(
            str(shape), forward, backward, "" if least is None else f"{least:.2f}",
            f"{float(backward) / float(both):.1f}", peak, f"{float(peak) / inputs:.1f}", first, accuracy(shape),
        )  # fmt: skip
    console.print(table)


def main(settings: Settings) -> None:
    properties = torch.cuda.get_device_properties(0)
    bandwidth = copy_bandwidth()
    console = Console(width=120)
    console.print(f"{properties.name}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, ", end="")
    if settings.shapes == "models":
        console.print(f"{settings.tokens[0]} tokens")
        models(settings.tokens[0], bandwidth, console)
        return
    console.print(f"{settings.heads} heads of {settings.head_dim}, bf16")
    times = ("forward", "+ backward", "host", "graph: forward", "+ backward")
    table = Table("op", "tokens", "by", *times, "peak GiB", "first call s", "error")
    sizes = settings.heads, settings.head_dim, settings.head_dim
    shapes = {op: Shape(op, 1 if op == "log-linear" else settings.heads, *sizes) for op in settings.ops}

    def drawn(shape: Shape, tokens: int) -> dict[str, Tensor]:
        return draw(shape, 1 if settings.in_all is None else max(1, settings.in_all // tokens), tokens)

    for op, shape in shapes.items():
        for tokens in settings.tokens:
            tensors = drawn(shape, tokens)
            table.add_row(op, str(tokens), "floor", *floor(tensors, bandwidth))
            table.add_row("", "", "lasp", *measure(ours(op, "triton"), tensors, graph=True), accuracy(shape))
            if settings.peer and (peer := theirs(op)):
                table.add_row("", "", "fla", *measure(peer, tensors))
    if settings.softmax:
        plain = Shape("none", settings.heads, *sizes)
        for tokens in settings.tokens:
            table.add_row("softmax", str(tokens), "cuDNN", *measure(softmax, drawn(plain, tokens)))
    console.print(table)
    columns = (f"batch {batch}" for batch in settings.decode_batches)
    steps = Table("one token, microseconds", *columns)
    for op, shape in shapes.items():
        if "log-linear" not in op:
            steps.add_row(op, *(decode(shape, batch) for batch in settings.decode_batches))
            continue
        for seen in SEEN:
            times = (decode_log_linear(shape, batch, seen) for batch in settings.decode_batches)
            steps.add_row(f"{op}, behind {seen:,} tokens", *times)
    console.print(steps)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
