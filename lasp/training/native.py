"""The engine without DeepSpeed: FSDP2, or the same weights on every rank."""

import math
from typing import Any

import torch
from torch import Tensor

from lasp.config import TrainConfig
from lasp.kernels.pending import Pending
from lasp.parallel.apply import parallelize, reduce_gradients
from lasp.parallel.groups import flatten
from lasp.training import checkpoint
from lasp.training.initial import Build
from lasp.training.numerics import any_nonfinite
from lasp.training.optimizer import build_optimizer, divide_in_step, excess, gradients_of, norm_of, set_learning_rate
from lasp.training.ownership import Lock
from lasp.training.runtime import World


class NativeEngine:
    """FSDP2, or the same weights on every rank. In bfloat16 FSDP gathers float32 parameters as bfloat16 and sums
    gradients in float32."""

    def __init__(self, config: TrainConfig, world: World, build: Build):
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
        self.halted = torch.zeros((), device=world.device)
        self.optimizer.found_inf = self.halted  # type: ignore[attr-defined]  # it takes no step where that is 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float, loss: Tensor) -> Tensor:
        reduce_gradients(self.model, self.mesh)
        gradients = gradients_of(self.model)
        grad_norm = norm_of(gradients)
        odd = any_nonfinite(torch.stack([grad_norm, loss]), flatten(self.mesh).get_group())
        self.halted.clamp_(min=odd)
        set_learning_rate(self.optimizer, lr)
        divide_in_step(self.optimizer, gradients, excess(grad_norm, self.config.optimizer.clip_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm.where((odd == 0) | ~grad_norm.isfinite(), math.nan)

    def go_on(self) -> None:
        self.halted.zero_()

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
