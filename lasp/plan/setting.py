"""What a plan is made for: a job, and what may be chosen in it."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from lasp.config import ModelConfig, TrainConfig, require
from lasp.models import Decoder
from lasp.models.moe import Experts
from lasp.models.recompute import Policy
from lasp.plan.gpus import GPU


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model on contexts of so many tokens, over GPUs of a kind.

    sharding: of what parameters, gradients and optimiser's states are divided by: "fsdp", "none" or a stage of ZeRO.
    accumulated: contexts that a data-parallel group takes in one step, at_once of them at a time.
    """

    model: ModelConfig
    context: int
    gpu: GPU
    gpus: int = 1
    sharding: Literal["fsdp", "none", "zero-0", "zero-1", "zero-2", "zero-3"] = "fsdp"
    half: int = 2  # bytes of the compute's numbers
    expert_parallel: int = 1
    accumulated: int = 1
    at_once: int = 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """sequence_parallel: ranks that share a context; the others see contexts of their own. recompute_layers: so many
    follow the policy, and the others the one that keeps more; all if None. segment_offload: what segments hand on waits
    in the host's memory. segment_graphs: so many segments at the end are computed once."""

    sequence_parallel: int = 1
    recompute: Policy = "none"
    recompute_layers: int | None = None
    offload_activations: bool = False
    segment_tokens: int | None = None
    segment_offload: bool = False
    segment_graphs: int = 1


def job_of(config: TrainConfig, gpu: GPU, gpus: int) -> Job:
    """Raises ValueError for a model of the user's own code, and for one that such GPUs cannot share."""
    own = config.model.model_class or config.model.mixer
    expected = "one of lasp's, of which alone plans are made: choose recompute (none, selective, full) yourself"
    require(not config.model.is_own, "model", own, expected)
    data_parallel, _ = config.mesh_shape(gpus)
    sharding = f"zero-{config.deepspeed.stage}" if config.engine == "deepspeed" else "fsdp"
    if config.engine == "native" and not config.parallel.fsdp:
        sharding = "none"
    return Job(
        model=config.model,
        context=config.context_length,
        gpu=gpu,
        gpus=gpus,
        sharding=sharding,  # type: ignore[arg-type]
        half={"bfloat16": 2, "float32": 4, "float64": 8}[config.dtype],
        expert_parallel=config.parallel.expert_parallel,
        accumulated=config.batch_contexts // data_parallel,
        at_once=config.contexts_at_once,
    )


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. ends: embedding, last norm and head; experts: of the layers' mixtures, in all layers."""

    ends: int
    layers: tuple[int, ...]
    experts: int

    @property
    def total(self) -> int:
        return self.ends + sum(self.layers) + self.experts


@cache
def sizes(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        model = Decoder(config)
    experts = {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    layers = tuple(sum(p.numel() for p in layer.parameters() if id(p) not in experts) for layer in model.layers)
    of_experts = sum(p.numel() for p in model.parameters() if id(p) in experts)
    return Sizes(sum(p.numel() for p in model.parameters()) - sum(layers) - of_experts, layers, of_experts)
