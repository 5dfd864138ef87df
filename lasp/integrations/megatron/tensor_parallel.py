"""lasp's mixers over a tensor-parallel group: every rank has some of the heads.

A mixer's parameters are ordered head by head, so that a rank's share is a run of rows, or of columns where the output
is projected; the rest (norms of single heads, low-rank factors, Mamba-2's B and C) is whole on every rank. A rank's
mixer is then lasp's own with fewer heads, between one entry and one exit:

    x ──enter──> mixer of the rank's heads ──leave──> y = Σ over the ranks

enter and leave are Megatron's (with its sequence parallelism an all-gather and a reduce-scatter of tokens, else an
identity and an all-reduce; backward mirrors them). What is whole on every rank gets a part of its gradient on each.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lasp.kernels.dtypes import accumulation_dtype
from lasp.models.decays import ConstantDecay
from lasp.models.layers import RMSNorm, at_least_float32
from lasp.models.mixers import Mamba2Mixer


def enter(x: Tensor, sequence_parallel: bool, group: Any) -> Tensor:
    """[s, b, h] -> [s, b, h], or [s · TP, b, h] with sequence parallelism; backward sums over the ranks."""
    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
    return _copy(x, group)


def _copy(x: Tensor, group: Any) -> Tensor:
    """x, its gradient summed over the ranks. 0.16.1 loses the sum of a gradient that is not contiguous."""
    y = mappings.copy_to_tensor_model_parallel_region(x, group=group)
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y


def leave(y: Tensor, sequence_parallel: bool, group: Any) -> Tensor:
    """The inverse of `enter`: the sum over the ranks, of this rank's tokens alone with sequence parallelism."""
    if sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
    return mappings.reduce_from_tensor_model_parallel_region(y, group=group)


class FixedDecay(nn.Module):
    """A rank's share of a constant decay, [H / TP]; not a buffer, which would become half precision with the model."""

    def __init__(self, log_decay: Tensor):
        super().__init__()
        self.log_decay = log_decay

    def forward(self, x: Tensor) -> Tensor:
        self.log_decay = self.log_decay.to(x.device)
        return self.log_decay.to(accumulation_dtype(x))


class ParallelRMSNorm(RMSNorm):
    """RMSNorm over all channels, of which this rank has some."""

    def __init__(self, channels: int, eps: float | None, group: Any):
        super().__init__(channels, eps=eps)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        own = wide.square().mean(-1, keepdim=True).contiguous() / self.group.size()
        mean = mappings.reduce_from_tensor_model_parallel_region(own, group=self.group)
        mean = _copy(mean, self.group)  # every rank's output depends on it
        return (wide * (mean + (self.eps or 0.0)).rsqrt()).to(x.dtype) * self.weight.to(x.dtype)


class Rows(nn.Module):
    """A parametrisation: one tensor that is two parameters, the first `count` rows and the others."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, first: Tensor, others: Tensor) -> Tensor:
        return torch.cat([first, others])

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        return whole[: self.count], whole[self.count :]


def partition_dim(name: str) -> int | None:
    """The dimension along which a mixer's parameter is split over the ranks; None if it is whole on each."""
    whole = name == "output.norm.weight" or name.endswith((".proj.0.weight", "original1"))
    return None if whole else int(name.endswith("out_proj.weight"))


def split_over_heads(make: Callable[[int], nn.Module], heads: int, group: Any, config: Any) -> nn.Module:
    """make(heads / TP), initialised as Megatron does it and marked for its optimizers and gradient reductions.

    Args:
        make: builds and initialises the mixer with that many heads, drawing from the default generator.
        heads: of the whole layer, a multiple of the group's size.
        config: Megatron's TransformerConfig.
    """
    tp, rank = group.size(), group.rank()
    whole_on_cpu = config.use_cpu_initialization and tp > 1
    device = nullcontext() if config.use_cpu_initialization else torch.device(torch.cuda.current_device())
    with device:
        shared = _separate(make(heads if whole_on_cpu else heads // tp), rank, heads, group)
        own = shared
        if whole_on_cpu:
            with torch.random.fork_rng(devices=[]):  # what is drawn next does not depend on the number of ranks
                own = _separate(make(heads // tp), rank, heads, group)
        elif tp > 1:
            with get_cuda_rng_tracker().fork():
                own = _separate(make(heads // tp), rank, heads, group)
    for (name, parameter), source in zip(own.named_parameters(), shared.parameters(), strict=True):
        dim = partition_dim(name)
        with torch.no_grad():
            if dim is None:
                parameter.copy_(source)
            elif whole_on_cpu:
                parameter.copy_(source.chunk(tp, dim)[rank])
        if tp > 1:
            mark(parameter, dim, group)
    return own.to(config.params_dtype)


def mark(parameter: nn.Parameter, dim: int | None, group: Any) -> None:
    """Tells Megatron how a parameter is split; the gradient of one that is whole is summed over the ranks."""
    if dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        return

    def total(gradient: Tensor) -> Tensor:
        own = gradient.clone(memory_format=torch.contiguous_format)
        return mappings.reduce_from_tensor_model_parallel_region(own, group=group)

    parameter.register_hook(total)


def _separate(mixer: nn.Module, rank: int, heads: int, group: Any) -> nn.Module:
    """Gives what is split and what is whole parameters of their own, and the rank's modules their share."""
    for name, module in list(mixer.named_modules()):
        if isinstance(module, ConstantDecay):
            share = module.values(heads).chunk(group.size())[rank]
            mixer.set_submodule(name, FixedDecay(share))
    if isinstance(mixer, Mamba2Mixer):
        inner = mixer.sizes[0]
        for module, names in ((mixer.xbc_proj, ["weight"]), (mixer.conv, ["weight", "bias"])):
            for name in names:
                parametrize.register_parametrization(module, name, Rows(inner))
        if group.size() > 1:
            norm = mixer.norm
            mixer.norm = ParallelRMSNorm(inner, norm.eps, group)
            nn.init.ones_(mixer.norm.weight)
    return mixer
