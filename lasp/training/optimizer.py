"""AdamW, its learning-rate schedule, and clipping by the global gradient norm."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lasp.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only: norms, biases and constants of gates keep theirs.

    Stacks of experts are a group of their own, since expert parallelism places them on another mesh than the rest.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim > 2], "weight_decay": config.weight_decay},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 <= step < steps.

    Warm-up is linear and reaches lr at step warmup_steps. Then, with u in [0, 1) the part of the decay that has passed
    and m = min_ratio:
        cosine   lr (m + (1 - m) (1 + cos(pi u)) / 2), decaying from the end of the warm-up
        wsd      lr (m + (1 - m) (1 - u)), decaying over the last decay_fraction of the steps, constant before
                 (warmup-stable-decay, arXiv:2404.06395)
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - round(steps * config.decay_fraction))
    u = max(0, step - start) / max(1, steps - start)
    shape = (1 + math.cos(math.pi * u)) / 2 if config.schedule == "cosine" else 1 - u
    return config.lr * (config.min_ratio + (1 - config.min_ratio) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradients_of(model: nn.Module) -> list[list[Tensor]]:
    """Those of parameters that are placed on one mesh, and have one dtype, together."""
    together: dict[tuple[DeviceMesh | None, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        if (grad := parameter.grad) is not None:
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            together.setdefault((mesh, grad.dtype), []).append(grad)
    return list(together.values())


def norm_of(gradients: list[list[Tensor]]) -> Tensor:
    """The norm of all of a model's gradients, already summed over the ranks: a float64 scalar.

    The host does not wait for it. Sharded gradients count with all their shards.
    """
    totals = [nn.utils.get_total_norm(grads) for grads in gradients]
    norms = torch.stack([(t.full_tensor() if isinstance(t, DTensor) else t).double() for t in totals])
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)


def excess(norm: Tensor, max_norm: float) -> Tensor:
    """By what gradients of this norm are to be divided, so that it is at most max_norm; 1 where it is not finite."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0).where(norm.isfinite(), 1.0)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Divides the gradients by their excess; returns the norm before."""
    gradients = gradients_of(model)
    norm = norm_of(gradients)
    for grads in gradients:
        torch._foreach_div_(grads, excess(norm, max_norm))
    return norm


def divide_in_step(optimizer: torch.optim.AdamW, gradients: list[list[Tensor]], divisor: Tensor) -> None:
    """Has the optimiser divide the gradients by a scalar as it reads them in its next step.

    That takes it as a float32 number. What this leaves of it is for float64 gradients, which are divided here.
    """
    optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
    for grads in gradients:
        if grads[0].dtype == torch.float64:
            torch._foreach_div_(grads, divisor / optimizer.grad_scale)  # type: ignore[attr-defined]


def require_finite(value: float, name: str) -> float:
    """The value; FloatingPointError if it is not finite."""
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: got {value}, expected a finite number")
    return value
