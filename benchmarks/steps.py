"""Training steps as `lasp train` makes them, on random tokens, for the benchmarks of whole models."""

from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from watch import Watched

from lasp.config import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from lasp.data import Context
from lasp.models import flops_per_token
from lasp.models.mixers import SoftmaxMixer
from lasp.models.recompute import Policy
from lasp.parallel import SequenceParallel
from lasp.training.balance import balance_experts
from lasp.training.engine import make_engine
from lasp.training.runtime import World
from lasp.training.streaming import Segments
from lasp.training.train import all_ranks, compute_gradients

Way = Literal["SP", "DP"]  # one sequence over all ranks, or a sequence for each


class Trainer:
    """A model with its optimiser, sharded over all ranks (FSDP); bf16 on GPUs, fp32 on a CPU.

    Its steps share the weights. The learning rate is 0, so that each does what the others do.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: torch.device,
        expert_parallel: int = 1,
        recompute: Policy = "full",
        recompute_layers: int | None = None,
        offload_activations: bool = False,
    ):
        self.ranks, self.device = dist.get_world_size(), device
        self.config = TrainConfig(
            model=model,
            data=DataConfig(train="none", valid="none"),
            run_dir="none",
            steps=1,
            context_length=2,
            dtype="bfloat16" if device.type == "cuda" else "float32",
            parallel=ParallelConfig(expert_parallel=expert_parallel),
            recompute=recompute,
            recompute_layers=recompute_layers,
            offload_activations=offload_activations,
            device=device.type,
        )
        torch.manual_seed(0)  # FSDP shards what must be equal on all ranks
        self.engine = make_engine(self.config, _world("SP", device))
        self.softmax = [module for module in self.engine.model.modules() if isinstance(module, SoftmaxMixer)]

    def step(self, tokens: int, way: Way = "SP", segments: Segments | None = None) -> Watched:
        """A step on so many tokens of each rank; SP is zigzag. The softmax layers' mixers are watched."""
        world = _world(way, self.device)
        group, layout = (
            (world.mesh["sp"].get_group(), "zigzag") if world.mesh["sp"].size() > 1 else (None, "contiguous")
        )
        sp = SequenceParallel(group, layout=layout, aligned=self.config.model.aligned, device=self.device)
        sequences = world.mesh["dp"].size()
        contexts = [self._context(tokens * self.ranks // sequences, seed) for seed in range(sequences)]

        def step() -> None:
            loss = compute_gradients(self.engine, contexts, sp, world, segments)
            self.engine.step(0.0, loss)
            if self.config.model.num_experts:
                balance_experts(self.engine.model, all_ranks)

        return Watched(step, self.device, self.softmax)

    def flops(self, tokens: int, way: Way = "SP") -> float:
        """The model's FLOPs of such a step on one rank."""
        return flops_per_token(self.config.model, tokens * (self.ranks if way == "SP" else 1)) * tokens

    def _context(self, length: int, seed: int) -> Context:
        """One document."""
        tokens = np.random.default_rng(seed).integers(self.config.model.vocab_size, size=length + 1)
        return Context(tokens, np.array([0, length]), np.array([0]), np.array([length + 1]))


@cache
def _world(way: Way, device: torch.device) -> World:
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (1, ranks) if way == "SP" else (ranks, 1), mesh_dim_names=("dp", "sp"))
    return World(rank=dist.get_rank(), size=ranks, device=device, mesh=mesh)
