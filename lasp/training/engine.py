"""Who holds the weights and updates them: PyTorch itself, or DeepSpeed (lasp.training.deepspeed)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lasp.config import TrainConfig
from lasp.kernels.pending import Pending
from lasp.models import Decoder
from lasp.models.recompute import POLICIES
from lasp.parallel.apply import parallelize, reduce_gradients
from lasp.parallel.groups import flatten
from lasp.training import checkpoint
from lasp.training.numerics import all_finite
from lasp.training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from lasp.training.ownership import Lock
from lasp.training.planning import settled
from lasp.training.runtime import World

AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)


class Engine(Protocol):
    """What the loop needs. Calls are made by all ranks together, in the same order."""

    model: Decoder
    """Or what is called as it is."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the step's loss; the parts of all contexts and all ranks sum up to the loss.

        Called once for each of the batch_contexts / data_parallel contexts of this rank's group.
        """
        ...

    def step(self, lr: float) -> float:
        """Clips the summed gradients, updates the weights, and begins anew; returns the gradient norm before clipping.

        Where that is not finite, on any rank, it is so on all: the step cannot be taken, and no weight has changed, but
        with DeepSpeed.
        """
        ...

    def save(self, step: int, lock: Lock, record: dict[str, Any]) -> None:
        """Saves a checkpoint of the run, which holds the lock, after that many steps; a record beside its settings.

        With config.checkpoint_async it may be under way still when this returns. Raises FloatingPointError on every
        rank, and saves nothing, if a weight or a state is not finite.
        """
        ...

    def finish_saving(self) -> None:
        """Returns when the last save is done; raises what it raised."""
        ...

    def restore(self) -> int:
        """Goes back to the run's last checkpoint, if there is one; returns how many steps had been taken (0: none)."""
        ...


Build = Callable[[TrainConfig, torch.device], Decoder]


def build_model(config: TrainConfig, device: torch.device) -> Decoder:
    return build_kind(Decoder, config, device)


def build_kind(kind: type[AnyDecoder], config: TrainConfig, device: torch.device) -> AnyDecoder:
    """The model with fresh weights, or with those of config.initial_weights, in float32 or float64."""
    with device:
        model = kind(config.model)
    assert config.recompute in POLICIES, "what auto stands for is settled before"
    model.recompute, model.recompute_layers = config.recompute, config.recompute_layers
    model.offload_activations = config.offload_activations
    if config.dtype == "float64":
        model.double()
    if config.initial_weights is not None:
        checkpoint.require_same_model(Path(config.initial_weights), config.model)
        checkpoint.load_model(config.initial_weights, model, on_all_ranks=True)
    return model


def make_engine(config: TrainConfig, world: World, build: Build = build_model) -> Engine:
    """The engine that config.engine names, with a model of fresh weights, the same on every rank.

    Raises ValueError for a configuration that the engine cannot run, or if it is not installed.
    """
    config = settled(config, world)
    if config.engine == "deepspeed":
        from lasp.training.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, world)
    return NativeEngine(config, world, build)


class NativeEngine:
    """FSDP2, or the same weights on every rank. In bfloat16 FSDP gathers float32 parameters as bfloat16 and sums
    gradients in float32."""

    def __init__(self, config: TrainConfig, world: World, build: Build = build_model):
        self.config, self.mesh, self.saves = config, world.mesh, world.saves
        self.saving: Pending[None] | None = None
        compute_dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.model = parallelize(
            build(config, world.device),
            world.mesh,
            fsdp=config.parallel.fsdp,
            compute_dtype=compute_dtype,
            expert_parallel=config.parallel.expert_parallel,
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        reduce_gradients(self.model, self.mesh)
        grad_norm = clip_gradients(self.model, self.config.optimizer.clip_norm)
        if not all_finite(grad_norm, flatten(self.mesh).get_group()):
            return math.nan if math.isfinite(grad_norm) else grad_norm
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm

    def save(self, step: int, lock: Lock, record: dict[str, Any]) -> None:
        self.finish_saving()
        state = self.model, self.optimizer, self.config
        self.saving = checkpoint.save(self.config.run_dir, step, *state, lock, record, self.saves)

    def finish_saving(self) -> None:
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.wait()

    def restore(self) -> int:
        return checkpoint.restore(self.config.run_dir, self.model, self.optimizer, self.config, self.saves)
