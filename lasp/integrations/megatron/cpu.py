"""Megatron-Core without a GPU, to try things out: it names CUDA literally where it could ask for a device.

Process groups must be gloo's, `TransformerConfig.use_cpu_initialization` must be True.
"""

from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors asked for on CUDA, or in pinned memory, come into being on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # its gradient clipping compares this name
            return func(*args).replace("torch.", "torch.cuda.")
        kwargs.pop("pin_memory", None)
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Nothing:
    """Stands for a CUDA stream or event: work on the CPU is done when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


@cache
def run_on_cpu() -> None:
    """Makes this process's Megatron-Core use the CPU from now on. There is no way back; call it before building models.

    Raises:
        ValueError: this machine has a GPU, which Megatron-Core should use.
    """
    if torch.cuda.is_available():
        raise ValueError("run_on_cpu: got a machine with a GPU, expected one without")
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # its others seed CUDA generators
    stand_ins = SimpleNamespace(
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args: None,
        current_stream=_Nothing,
        default_stream=_Nothing,
        Stream=_Nothing,
        Event=_Nothing,
        stream=lambda stream: nullcontext(),
    )
    for name, stand_in in vars(stand_ins).items():
        setattr(torch.cuda, name, stand_in)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    token_dispatcher.maybe_move_tensor_to_cpu = _on_cpu
    _CudaMeansCpu().__enter__()


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's function of that name turns a tensor into an array only if it has to move it."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
