"""Times training steps of whole models over all ranks, as `lasp train` makes them: FSDP, recomputation, AdamW.

    torchrun --nproc-per-node 2 benchmarks/training.py                            all of it; bf16 on GPUs
    torchrun --nproc-per-node 2 benchmarks/training.py --cases llama --profile 30      and the kernels that take longest

llama    Linear-Llama3-1B, pure: one sequence over all ranks (SP) beside one on each (DP), with as many tokens of a rank
         and of a step, runs alternating
hybrid   the same with softmax attention in every fourth layer beside pure, one sequence over all ranks
moe      Linear-MoE A0.3B-2B, pure, its experts on every rank or spread over them, beside a dense model with as many
         active parameters, one sequence over all ranks
log_linear   24 layers of 8 heads of 128 (0.4 billion parameters), pure, of Mamba-2 and Gated DeltaNet, each beside its
         log-linear form, one sequence over all ranks

Of every run the slowest rank counts; the median of the runs is told. MFU counts the model's own FLOPs, forward and
backward, against the dense bf16 peak that the GPU's vendor states. On a CPU models are tiny, and in fp32.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.distributed as dist
import tyro
from clock import Clock
from ranks import join, machine, say
from steps import Trainer, Way

from lasp.config import LOG_LINEAR, ModelConfig
from lasp.models import count_active_parameters, linear_llama3_1b, linear_moe_a0_3b_2b, tiny
from lasp.parallel import leave
from lasp.training.metrics import model_flop_utilisation, peak_flops

Case = Literal["llama", "hybrid", "moe", "log_linear"]
COLUMNS = ("model", "active parameters", "tokens a rank", "ms", "tokens/s", "MFU", "peak GiB", "softmax layers")


@dataclass(frozen=True, kw_only=True)
class Settings:
    cases: tuple[Case, ...] = get_args(Case)
    llama_tokens: int = 262144  # of each rank
    hybrid_tokens: int = 262144  # of all ranks
    moe_tokens: int = 131072  # of all ranks
    log_linear_tokens: int = 65536  # of each rank
    runs: int = 3
    profile: int = 0  # so many kernels of each model's first step are listed


@dataclass(frozen=True)
class Benchmark:
    settings: Settings
    clock: Clock

    @property
    def cuda(self) -> bool:
        return self.clock.device.type == "cuda"

    def llama(self) -> None:
        model = linear_llama3_1b(pattern="L") if self.cuda else tiny(pattern="L")
        ways: dict[str, Way] = {"pure, one sequence (SP)": "SP", "pure, a sequence on each rank (DP)": "DP"}
        seconds = self.measure(model, ways, self.settings.llama_tokens)
        split, apart = seconds.values()
        say(f"\nSP at {apart / split:.1%} of the tokens/s of DP\n")

    def hybrid(self) -> None:
        for name, pattern in (("pure", "L"), ("hybrid", "LLLN")):
            model = linear_llama3_1b(pattern=pattern) if self.cuda else tiny(pattern=pattern)
            self.measure(model, {name: "SP"}, self.settings.hybrid_tokens // dist.get_world_size())

    def moe(self) -> None:
        mixture = linear_moe_a0_3b_2b(pattern="L")
        if not self.cuda:
            mixture = replace(tiny(pattern="L"), num_experts=4, expert_intermediate_size=32)
        dense = replace(
            mixture, num_experts=0, intermediate_size=mixture.experts_per_token * mixture.expert_size
        )  # fmt: skip
        tokens, ranks = self.settings.moe_tokens // dist.get_world_size(), dist.get_world_size()
        self.measure(dense, {"dense": "SP"}, tokens)
        self.measure(mixture, {"mixture, experts on every rank": "SP"}, tokens)
        if ranks > 1:
            self.measure(mixture, {f"mixture, experts over {ranks} ranks": "SP"}, tokens, expert_parallel=ranks)

    def log_linear(self) -> None:
        small = linear_llama3_1b(pattern="L") if self.cuda else tiny(pattern="L")
        if self.cuda:
            small = replace(small, vocab_size=32_000, hidden_size=1024, num_layers=24, num_heads=8)
            small = replace(small, intermediate_size=2816)
        for plain in ("mamba2", "gated_delta_net"):
            for mixer in (plain, f"{LOG_LINEAR}{plain}"):
                self.measure(replace(small, mixer=mixer), {mixer: "SP"}, self.settings.log_linear_tokens)

    def measure(self, model: ModelConfig, ways: dict[str, Way], tokens: int, expert_parallel: int = 1):
        """Seconds of a step on so many tokens of each rank, by the names of `ways`; prints a row for each."""
        trainer = Trainer(model, self.clock.device, expert_parallel)
        steps = {name: trainer.step(tokens, way) for name, way in ways.items()}
        seconds = self.clock.medians(dict(steps))
        peak, ranks = peak_flops(self.clock.device, trainer.config.dtype), dist.get_world_size()
        for name, step in steps.items():
            rate, most, share = tokens * ranks / seconds[name], step.peak_bytes(), step.share()
            flops = trainer.flops(tokens, ways[name]) / tokens
            say_row(
                name,
                f"{count_active_parameters(model):,}",
                f"{tokens:,}",
                f"{1e3 * seconds[name]:,.1f}",
                f"{rate:,.0f}",
                "" if peak is None else f"{model_flop_utilisation(flops, rate, ranks, peak):.1%}",
                "" if most is None else f"{most / 2**30:.1f}",
                "" if share is None else f"{share:.1%}",
            )
        if self.settings.profile:
            say(kernels(next(iter(steps.values())), self.settings.profile))
        del trainer, steps, step
        gc.collect()  # models hold themselves
        torch.compiler.reset()  # or what is compiled for the next model would serve both
        if self.cuda:
            torch.cuda.empty_cache()
        return seconds


def kernels(step: Callable[[], object], count: int) -> str:
    """A table of those that take most of this rank's time in one step."""
    cuda = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=count, max_name_column_width=100)


def say_row(*cells: str) -> None:
    say(f"| {' | '.join(cells)} |")


def main(settings: Settings) -> None:
    clock = Clock(join(), settings.runs)
    say(f"{machine()}\n")
    say_row(*COLUMNS)
    say_row(*["---"] * len(COLUMNS))
    benchmark = Benchmark(settings, clock)
    for case in settings.cases:
        getattr(benchmark, case)()
    leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
