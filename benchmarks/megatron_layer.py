"""lasp's Gated DeltaNet beside Megatron-Core's, as layers of Megatron under context parallelism, with the same weights.

    torchrun --nproc-per-node 2 benchmarks/megatron_layer.py
    torchrun --nproc-per-node 2 benchmarks/megatron_layer.py --no-peer --tokens 1048576      lasp's alone, a longer one

Megatron's layer exchanges tokens for heads by all-to-all and runs flash-linear-attention's kernels, which must be
installed and tune themselves for minutes before the first result. Told are milliseconds for forward and backward (runs
are interleaved, the slowest rank counts, the median of the runs), GiB above weights and input at the peak, and what
rank 0 sends, in MiB: as computed from the shapes, and as counted. `auto` may read its peers' memory instead of sending
messages; it moves what `all_gather` does. Difference: of the outputs, relative, by norm.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from clock import Clock
from peers import allow_wrong_gradients
from ranks import machine, say
from torch import Tensor, nn
from traffic import Traffic

from lasp.parallel import leave
from lasp.parallel.exchange import make_exchange
from lasp.parallel.layout import Layout

try:
    from megatron.core import __version__, parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from lasp.integrations.megatron import LinearSelfAttention, run_on_cpu
    from lasp.integrations.megatron.norm import Norm
    from lasp.integrations.megatron.sequence import context_parallel
except ImportError as missing:
    sys.exit(f"this benchmark needs megatron-core 0.19: {missing}")
if __version__ < "0.19":
    sys.exit(f"this benchmark needs megatron-core 0.19: {__version__}'s Gated DeltaNet knows no context parallelism")

WIDTH = 4  # of the short convolution
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    tokens: tuple[int, ...] = (65536, 262144)  # of all ranks
    hidden: int = 2048
    heads: int = 16
    head_dim: int = 128
    exchanges: tuple[str, ...] = ("auto", "all_gather")
    peer: bool = True  # Megatron's own layer
    runs: int = 10


@dataclass(frozen=True)
class Sent:
    """Bytes of this rank in one forward and one backward pass."""

    forward: int
    backward: int

    def __str__(self) -> str:
        return f"{self.forward / MIB:9.3f} {self.backward / MIB:9.3f}"


def configure(settings: Settings, cuda: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=settings.hidden,
        num_attention_heads=settings.heads,
        kv_channels=settings.head_dim,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        context_parallel_size=dist.get_world_size(),
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=1,
        linear_conv_kernel_dim=WIDTH,
        linear_key_head_dim=settings.head_dim,
        linear_value_head_dim=settings.head_dim,
        linear_num_key_heads=settings.heads,
        linear_num_value_heads=settings.heads,
        use_cpu_initialization=not cuda,
        deterministic_mode=not cuda,  # Megatron's layer in plain PyTorch
        bf16=cuda,
        params_dtype=torch.bfloat16 if cuda else torch.float32,
    )


def our_layer(config: TransformerConfig, exchange: str) -> LinearSelfAttention:
    """Of the same weights whatever the exchange."""
    torch.manual_seed(0)
    context_parallel.cache_clear()  # it keeps one exchange for all layers
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = LinearSelfAttention(config, 1, "gated_delta_net", conv_width=WIDTH, pg_collection=groups)
    parallel = layer.context.parallel
    parallel.exchange = make_exchange(exchange, parallel.layout, parallel.group)
    return layer


def their_layer(config: TransformerConfig, ours: LinearSelfAttention) -> nn.Module:
    """With the weights of ours. ImportError if flash-linear-attention is not installed."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

    parts = GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_norm=Norm, out_proj=RowParallelLinear)
    layer = GatedDeltaNet(config, parts, 1, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    if allow_wrong_gradients():
        say("Megatron's gradients are wrong with this version of Triton: for its speed only")
    torch._dynamo.config.suppress_errors = True  # it compiles parts of itself, or runs them as they are
    mixer: Any = ours.mixer
    gates = [mixer.output.gate_proj.weight, mixer.beta_proj.weight, mixer.decay.proj.weight]
    weights = {
        "in_proj.weight": torch.cat([_kind_by_kind(mixer.qkv_proj.weight, mixer), *gates]),
        "conv1d.weight": _kind_by_kind(mixer.conv.weight, mixer)[:, None],
        "A_log": mixer.decay.A_log,
        "dt_bias": mixer.decay.dt_bias,
        "out_norm.weight": mixer.output.norm.weight,
        "out_proj.weight": mixer.output.out_proj.weight,
    }
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(weights[name])
    return layer


def _kind_by_kind(rows: Tensor, mixer: Any) -> Tensor:
    """Rows of all heads' q, then k, then v, which lasp keeps head by head."""
    kinds = rows.unflatten(0, (mixer.heads, -1)).split(mixer.sizes, dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in kinds])


def our_bytes(settings: Settings, item: int) -> Sent:
    """States in fp32, in forward with their transitions, of two units to all others; the convolution's halos."""
    ranks, rank, size = dist.get_world_size(), dist.get_rank(), settings.head_dim
    layout = Layout("zigzag", ranks)
    borders = [(layout.owner(unit), layout.owner(unit + 1)) for unit in range(layout.units - 1)]
    out = sum(rank == before != after for before, after in borders)
    back = sum(rank == after != before for before, after in borders)
    state = layout.units_per_rank * (ranks - 1) * settings.heads * size * size * 4
    halo = (WIDTH - 1) * 3 * settings.heads * size * item
    return Sent(2 * state + out * halo, state + back * halo)


def their_bytes(settings: Settings, tokens: int, item: int) -> Sent:
    """q, k, v, gate and two scalars of every head, and its output, of all tokens but those that stay."""
    ranks = dist.get_world_size()
    leaving = tokens // ranks * (ranks - 1) // ranks
    both = leaving * settings.heads * (5 * settings.head_dim + 2) * item
    return Sent(both, both)


@torch.compiler.set_stance("force_eager")
def count(layer: nn.Module, x: Tensor) -> Sent:
    with Traffic() as forward:
        y = layer(x, None)[0]
    with Traffic() as backward:
        y.backward(torch.ones_like(y))
    layer.zero_grad()
    return Sent(forward.sent, backward.sent)


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(layer(x, None)[0], [x, *layer.parameters()], dy)


def peak(call: Callable[[], object], device: torch.device) -> float:
    """GiB above what is there already."""
    if device.type == "cpu":
        return 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """The relative one of all ranks' outputs."""
    with torch.no_grad():
        got, expected = (layer(x, None)[0].double() for layer in (a, b))
    squares = torch.stack([(got - expected).square().sum(), expected.square().sum()])
    dist.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def compare(tokens: int, layers: dict[str, nn.Module], settings: Settings, clock: Clock) -> None:
    dtype = next(next(iter(layers.values())).parameters()).dtype
    shape = (tokens // dist.get_world_size(), 1, settings.hidden)
    x = torch.randn(shape, device=clock.device).to(dtype).requires_grad_()
    dy = torch.randn(shape, device=clock.device).to(dtype)
    calls = {name: partial(forward_backward, layer, x, dy) for name, layer in layers.items()}
    for call in calls.values():
        call()  # kernels compile and tune
    memory = {name: peak(call, clock.device) for name, call in calls.items()}
    seconds = clock.medians(calls)
    best = min(time for name, time in seconds.items() if name != "megatron")
    say(f"{tokens} tokens over {dist.get_world_size()} ranks, forward and backward")
    say(f"  {'':18} {'ms':>9} {'of lasp':>8} {'GiB':>6}")
    for name, time in seconds.items():
        say(f"  {name:18} {time * 1e3:9.3f} {time / best:8.3f} {memory[name]:6.2f}")
    say("  MiB sent in forward and backward, computed and counted")
    for name, layer in layers.items():
        theirs = name == "megatron"
        computed = their_bytes(settings, tokens, x.itemsize) if theirs else our_bytes(settings, x.itemsize)
        say(f"  {name:18} {computed} {count(layer, x)}")
    if "megatron" in layers:
        say(f"  difference {difference(next(iter(layers.values())), layers['megatron'], x):.2e}")


def main(settings: Settings) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        run_on_cpu()
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    if cuda:
        model_parallel_cuda_manual_seed(0)
    say(f"{machine()}, {settings}")
    config = configure(settings, cuda)
    ours = [our_layer(config, name).to(device) for name in settings.exchanges]
    names = [f"lasp, {name}" for name in settings.exchanges]
    layers: dict[str, nn.Module] = dict(zip(names, ours, strict=True))
    if settings.peer:
        try:
            layers["megatron"] = their_layer(config, ours[0]).to(device)
        except ImportError as missing:
            say(f"without Megatron's layer: {missing}")
    for tokens in settings.tokens:
        compare(tokens, layers, settings, Clock(device, settings.runs))
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
