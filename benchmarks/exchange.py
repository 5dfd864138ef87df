"""Times the exchanges of states, and the ops under sequence parallelism beside the same ops without. Under torchrun:

    torchrun --nproc-per-node 2 benchmarks/exchange.py                      all of it, 16K and 64K tokens a GPU
    torchrun --nproc-per-node 2 benchmarks/exchange.py --tokens             the exchanges alone
    torchrun --nproc-per-node 2 benchmarks/exchange.py --calibrate inside   writes what links inside a node cost, for
                                                                            state_exchange="auto" (or across: nodes)

Runs are interleaved; of every run the slower rank counts, and the median of the runs is told, for several calls in a
row: as the host starts them ("eager"), and replayed from CUDA graphs, where only the GPU's time counts ("graph").
Exchanges: microseconds, combining included, beside the bare all-gather of as many bytes. Ops: milliseconds, forward and
backward, zigzag; "without" is the same op on the same local tokens. Log-linear attention has one q/k head, as in
Mamba-2, and exchanges by all-gather and reduce-scatter alone.
"""

import functools
import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from clock import Clock
from peers import allow_wrong_gradients
from ranks import join, machine, say
from torch import Tensor

from lasp.kernels import delta_rule, linear_attention, log_linear_attention, log_linear_delta_rule
from lasp.parallel import SequenceParallel, comm, leave
from lasp.parallel.combine import Affine
from lasp.parallel.cost import CALIBRATION, Costs, Link, Links

Op = Literal[
    "none",
    "constant",
    "scalar",
    "diagonal",
    "delta",
    "gated delta",
    "log-linear",
    "log-linear gated delta",
    "softmax",
]
Exchange = Literal["all_gather", "ring", "scan", "symmetric_memory", "auto"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    ops: tuple[Op, ...] = get_args(Op)
    exchanges: tuple[Exchange, ...] = get_args(Exchange)
    tokens: tuple[int, ...] = (16384, 65536)  # of each rank
    heads: int = 16
    head_dim: int = 128
    runs: int = 30
    times: int = 20  # calls in a row, so that what ranks start apart is no part of the time
    graphs: tuple[Exchange, ...] = get_args(Exchange)  # those of the exchanges that are captured, too
    peer: bool = True  # flash-linear-attention's context parallelism, if it is installed
    calibrate: Literal["inside", "across"] | None = None
    sizes: tuple[int, ...] = tuple(2**power for power in range(12, 25, 3))  # bytes of calibration's messages
    costs: Path = CALIBRATION  # the file that it writes


def compare(
    title: str, calls: dict[str, Callable[[], object]], capturable: set[str], clock: Clock, unit: float, times: int
) -> None:
    """A row for each of the calls, beside the first."""
    eager = clock.medians(calls, times)
    captured = {name: call for name, call in calls.items() if name in capturable and clock.device.type == "cuda"}
    graph = clock.medians(captured, times, graphs=True) if captured else {}
    say(f"{title}, x {next(iter(calls))}")
    for name in calls:
        row = f"  {name:28}"
        for kind, seconds in (("eager", eager), ("graph", graph)):
            if name in seconds:
                row += f"   {kind} {seconds[name] / unit:10.3f} {seconds[name] / next(iter(seconds.values())):6.3f} x"
        say(row)


@functools.cache
def parallel(exchange: str, layout: Literal["contiguous", "zigzag"] = "zigzag") -> SequenceParallel:
    return SequenceParallel(dist.group.WORLD, layout=layout, state_exchange=exchange, softmax="ring")


def exchanges(settings: Settings, clock: Clock) -> None:
    """Of one unit a rank (contiguous), 1 MiB with the default heads, and of two (zigzag)."""
    heads, size, device = settings.heads, settings.head_dim, clock.device
    kinds = {"none": None, "scalar": (heads,), "diagonal": (heads, size), "matrix": (heads, size, size)}
    layouts: tuple[Literal["contiguous", "zigzag"], ...] = ("contiguous", "zigzag")
    for layout, (kind, shape) in itertools.product(layouts, kinds.items()):
        made = {name: parallel(name, layout) for name in settings.exchanges}
        units = next(iter(made.values())).layout.units_per_rank
        states = torch.randn(units, 1, heads, size, size, device=device)
        transitions = None if shape is None else -torch.rand(units, 1, *shape, device=device) / size
        calls: dict[str, Callable[[], object]] = {
            "bare all-gather": functools.partial(comm.replicate, states, dist.group.WORLD)
        }
        for name, sequences in made.items():
            algebra = Affine((False,) * sequences.layout.units, backward=False)
            start = functools.partial(sequences.exchange.forward, states, transitions, algebra)
            calls[name] = lambda start=start: start().wait()
        title = f"{layout}, {states.nbytes / 2**20:g} MiB of states a rank, transition {kind}: microseconds"
        compare(title, calls, {"bare all-gather", *settings.graphs}, clock, 1e-6, settings.times)


def draw(op: Op, tokens: int, settings: Settings, device: torch.device) -> dict[str, Tensor]:
    """Local tensors in bf16 (fp32 on a CPU); decay in fp32, keys of unit length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, tokens, settings.heads, settings.head_dim)
    q_shape = (1, tokens, 1, settings.head_dim) if op == "log-linear" else shape
    q, k, v = (torch.randn(of, device=device).to(dtype) for of in (q_shape, q_shape, shape))
    tensors = {"q": q, "k": F.normalize(k.float(), dim=-1).to(dtype), "v": v}
    if "delta" in op:
        tensors["beta"] = torch.rand(shape[:3], device=device).to(dtype)
    gates = {"constant": shape[2:3], "diagonal": shape} | dict.fromkeys(
        ("scalar", "gated delta", "log-linear", "log-linear gated delta"), shape[:3]
    )
    if op in gates:
        tensors["decay"] = -0.1 * torch.rand(gates[op], device=device)
    if "log-linear" in op:
        levels = (tokens * dist.get_world_size() - 1).bit_length() + 1
        tensors["level_scales"] = torch.rand(*shape[:3], levels, device=device)
    return tensors


def forward_backward(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Callable[[], object]:
    """Every call makes its own leaves: what belongs to old ones may remember another stream than a CUDA graph's."""
    do = torch.randn_like(tensors["v"])

    def call() -> object:
        leaves = {name: x.detach().requires_grad_(x.ndim > 1) for name, x in tensors.items()}
        return torch.autograd.grad(function(**leaves), [x for x in leaves.values() if x.requires_grad], do)

    return call


def peer(tokens: int) -> Callable[..., Tensor] | None:
    """flash-linear-attention's context parallelism for the gated delta rule (contiguous layout)."""
    try:
        from fla.ops.cp import build_cp_context
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    if allow_wrong_gradients():
        say("flash-linear-attention's gradients are wrong with this version of Triton: for its speed only")
    offsets = torch.tensor([0, tokens * dist.get_world_size()], device="cuda")
    context = build_cp_context(offsets, group=dist.group.WORLD, cu_seqlens_cpu=offsets.cpu())
    return lambda q, k, v, beta, decay: chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, cp_context=context)[0]


def ops(settings: Settings, clock: Clock) -> None:
    alone: dict[Op, Callable[..., tuple[Tensor, object]]] = {
        "delta": delta_rule,
        "gated delta": delta_rule,
        "log-linear": log_linear_attention,
        "log-linear gated delta": log_linear_delta_rule,
    }
    for tokens in settings.tokens:
        for op in settings.ops:
            log_linear = "log-linear" in op
            tensors = draw(op, tokens, settings, clock.device)
            function = alone.get(op, linear_attention)
            method = "softmax_attention" if op == "softmax" else function.__name__
            calls: dict[str, Callable[[], object]] = {}
            if op != "softmax":
                calls["without"] = forward_backward(lambda function=function, **x: function(**x)[0], tensors)
            for name in ("ring",) if op == "softmax" else ("auto",) if log_linear else settings.exchanges:
                sequences = parallel("all_gather" if op == "softmax" else name)
                sequence = sequences.sequence(tokens * dist.get_world_size(), aligned=log_linear)
                function = getattr(sequence, method)
                calls[name] = forward_backward(
                    function if op == "softmax" else lambda function=function, **x: function(**x)[0], tensors
                )
            if op == "gated delta" and settings.peer and clock.device.type == "cuda" and (function := peer(tokens)):
                calls["flash-linear-attention"] = forward_backward(function, tensors)
            title = f"{op}, {tokens} tokens a rank, forward and backward: milliseconds"
            capturable = set() if op == "softmax" else {"without", *settings.graphs}
            compare(title, calls, capturable, clock, 1e-3, settings.times)


def calibrate(side: Literal["inside", "across"], settings: Settings, clock: Clock) -> None:
    """Fits the links to all-gathers, messages from rank to rank, and peer writes; rank 0 writes the file."""
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x = {size: torch.zeros(size // 4, device=clock.device) for size in settings.sizes}

    def fit(call: Callable[[Tensor], object], passes: int = 1) -> Link:
        """`passes`: how often the bytes pass over the link in one call."""
        times = clock.medians({str(size): functools.partial(call, x[size]) for size in settings.sizes}, times=10)
        return Link.fit([passes * size for size in settings.sizes], list(times.values()))

    def message(x: Tensor) -> None:
        """From every even rank to the next."""
        if rank % 2 == 0 and rank + 1 < ranks:
            comm.send_receive((x, rank + 1), None, group).wait()
        elif rank % 2:
            comm.send_receive(None, (x, rank - 1), group).wait()

    peer_write = None
    exchange = parallel("symmetric_memory", "contiguous").exchange
    algebra = Affine((False,) * ranks, backward=False)
    if side == "inside" and hasattr(exchange, "library"):

        def write(x: Tensor) -> None:
            exchange.forward(x.view(1, 1, 1, -1, 64), None, algebra).wait()

        peer_write = fit(write, ranks - 1)
    links = Links(fit(lambda x: comm.replicate(x, group), ranks - 1), fit(message), peer_write)
    if rank == 0:
        replace(Costs.read(settings.costs), **{side: links}).save(settings.costs)
    say(f"{side}: {links}\nwritten to {settings.costs} on {socket.gethostname()}")


def main(settings: Settings) -> None:
    clock = Clock(join(), settings.runs)
    if settings.calibrate:
        calibrate(settings.calibrate, settings, clock)
    else:
        say(machine())
        exchanges(settings, clock)
        ops(settings, clock)
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
