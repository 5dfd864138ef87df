"""A training step through Megatron-Core beside lasp's own: the same model, tokens, precision and recomputation.

    torchrun --nproc-per-node 2 benchmarks/megatron_step.py
    torchrun --nproc-per-node 2 benchmarks/megatron_step.py --cases llama3_1b:L --tokens 65536

Both split one sequence over all ranks (zigzag), compute in bf16 (fp32 on a CPU), keep fp32 weights and moments once per
rank's share (FSDP2; Megatron's distributed optimizer), and recompute every layer in backward. A case is a preset of
lasp.integrations.megatron.presets and a pattern of layers. A step is forward, backward and optimizer; the slowest rank
counts, and the median of the runs is told. Utilisation is that of the model's FLOPs, without what is recomputed;
memory is the peak of one rank; losses are those of the first step and of one after the runs.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import tyro
from clock import Clock
from ranks import machine, say
from torch import Tensor

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.data import Context
from lasp.models import PRESETS, count_active_parameters, count_parameters, flops_per_token
from lasp.parallel import SequenceParallel, leave
from lasp.training.balance import balance_experts
from lasp.training.engine import make_engine
from lasp.training.metrics import model_flop_utilisation, peak_flops
from lasp.training.runtime import join_world
from lasp.training.train import all_ranks, compute_gradients

try:
    from lasp.integrations.megatron.run import Run
    from lasp.integrations.megatron.train import Training, join_mesh
except ImportError as missing:
    sys.exit(f"this benchmark needs megatron-core (0.16.1 to 0.19): {missing}")

LR = 1e-4
Step = Callable[[], float]  # one training step; its loss


@dataclass(frozen=True, kw_only=True)
class Settings:
    cases: tuple[str, ...] = ("moe_a0_3b_2b:L", "llama3_1b:L", "llama3_1b:LLLN")
    mixer: str = "gated_delta_net"
    tokens: int = 131072  # of all ranks
    recompute: bool = True
    runs: int = 5


@dataclass(frozen=True)
class Measured:
    seconds: float
    memory: int  # bytes
    first_loss: float
    last_loss: float


class Tokens:
    """One sequence of random tokens, as Megatron's datasets and lasp's contexts give them."""

    def __init__(self, length: int, vocabulary: int):
        self.tokens = np.random.default_rng(0).integers(vocabulary, size=length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.tokens)
        counts = torch.ones(len(tokens))
        counts[-1] = 0
        positions = torch.arange(len(tokens))
        return {"tokens": tokens, "labels": tokens.roll(-1), "loss_mask": counts, "position_ids": positions}

    def context(self) -> Context:
        length = len(self.tokens)
        return Context(self.tokens, np.array([0, length]), np.array([0]), np.array([length]))


def megatron_run(case: str, settings: Settings) -> Run:
    preset, pattern = case.split(":")
    return Run(
        preset=preset,
        pattern=pattern,
        mixer=settings.mixer,
        data="none",
        run_dir="none",
        steps=settings.runs + 100,
        sequence_length=settings.tokens,
        global_batch=1,
        context_parallel=dist.get_world_size(),
        distributed_optimizer=True,
        recompute=settings.recompute,
        lr=LR,
        warmup_steps=0,
    )


@contextmanager
def megatron(shape: ModelConfig, data: Tokens, run: Run) -> Iterator[Step]:
    config = run.transformer_config(cpu=not torch.cuda.is_available())
    training = Training(run, config, shape.vocab_size)
    yield lambda: training.step(data, 0)
    config.grad_scale_func = config.no_sync_func = None  # a cycle through PyTorch's hooks, which is never collected


@contextmanager
def native(shape: ModelConfig, data: Tokens, settings: Settings, device: torch.device) -> Iterator[Step]:
    """What the loop of lasp.training.train does in a step."""
    config = TrainConfig(
        model=shape,
        data=DataConfig(train="none", valid="none"),
        run_dir="none",
        steps=settings.runs + 100,
        context_length=settings.tokens,
        parallel=ParallelConfig(sequence_parallel=dist.get_world_size(), layout="zigzag"),
        optimizer=OptimizerConfig(lr=LR, warmup_steps=0),
        dtype="bfloat16" if device.type == "cuda" else "float32",
        recompute=settings.recompute,
    )
    with join_world(config) as world:
        torch.manual_seed(config.seed)
        engine = make_engine(config, world)
        group = world.mesh["sp"].get_group()
        aligned, layout = config.model.aligned, config.parallel.layout
        parallel = SequenceParallel(group, layout=layout, aligned=aligned, device=world.device)
        context = data.context()

        def step() -> float:
            loss = compute_gradients(engine, [context], parallel, world)
            engine.step(LR, loss)
            if shape.num_experts:
                balance_experts(engine.model, all_ranks)
            return loss.item()

        yield step


def measure(path: AbstractContextManager[Step], clock: Clock) -> Measured:
    """Builds what makes the steps, takes them, and lets it go again."""
    cuda = clock.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    with path as step:
        first = step()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        memory = torch.cuda.max_memory_allocated() - before if cuda else 0
        seconds = clock.medians({"step": step})["step"]
        last = step()
    del step
    gc.collect()
    torch.compiler.reset()  # or what is compiled next would have to serve the shapes of both
    if cuda:
        torch.cuda.empty_cache()
    return Measured(seconds, memory, first, last)


def report(case: str, shape: ModelConfig, settings: Settings, device: torch.device, seen: dict[str, Measured]) -> None:
    active, ranks = count_active_parameters(shape), dist.get_world_size()
    say(f"{case}: {count_parameters(shape) / 1e9:.2f} billion parameters, {active / 1e9:.2f} active")
    say(f"  {'':10} {'ms':>10} {'tokens/s':>10} {'MFU %':>7} {'GiB':>7} {'of native':>10}   losses")
    flops, peak = flops_per_token(shape, settings.tokens), peak_flops(device, "bfloat16")
    for name, m in seen.items():
        rate = settings.tokens / m.seconds
        used = f"{100 * model_flop_utilisation(flops, rate, ranks, peak):7.1f}" if peak else f"{'-':>7}"
        memory, ratio = m.memory / 2**30, m.seconds / seen["native"].seconds
        losses = f"{m.first_loss:.3f}, {m.last_loss:.3f}"
        say(f"  {name:10} {m.seconds * 1e3:10.1f} {rate:10.0f} {used} {memory:7.1f} {ratio:10.3f}   {losses}")


def vocabulary(preset: str) -> int:
    """As lasp's own preset of that shape has; a small one for tests'."""
    return PRESETS[name]().vocab_size if (name := f"linear_{preset}") in PRESETS else 256


def main(settings: Settings) -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    clock = Clock(device, settings.runs)
    join_mesh(megatron_run(settings.cases[0], settings))
    say(f"{machine()}, {settings}")
    for case in settings.cases:
        run = megatron_run(case, settings)
        shape = run.shape(run.transformer_config(cpu=not cuda), vocabulary(run.preset))
        data = Tokens(settings.tokens, shape.vocab_size)
        paths = {
            "native": native(shape, data, settings, device),
            "megatron": megatron(shape, data, run),
        }
        report(case, shape, settings, device, {name: measure(path, clock) for name, path in paths.items()})
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
