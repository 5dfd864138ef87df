"""Which Triton kernels serve which inputs."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import DeltaInputs, Inputs, LinearInputs
from lasp.kernels.log_linear_inputs import LogLinearDeltaInputs, LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Op
from lasp.kernels.segments import Segments
from lasp.kernels.triton.decode import decode
from lasp.kernels.triton.delta.op import TritonDelta
from lasp.kernels.triton.device import MAX_HEAD, block_of, is_roomy, unsupported
from lasp.kernels.triton.diagonal.op import TritonDiagonal
from lasp.kernels.triton.launch import compile_ahead
from lasp.kernels.triton.log_linear.op import TritonLogLinear
from lasp.kernels.triton.log_linear_delta.op import TritonLogLinearDelta
from lasp.kernels.triton.scalar.op import TritonLinear

MAX_DELTA_KEY = 128  # of the log-linear one, whose programs hold a K x K transition
MIN_KEY = 32  # Triton 3.6 miscompiles products with narrower keys for Hopper
_ready: dict[tuple, str] = {}  # for each kind of inputs what the GPU lacks


def triton_op(x: LinearInputs, asked: bool, wants_summary: bool) -> tuple[Op[Any] | None, str]:
    """The op, its kernels compiled, or None and what it is that Triton's ops do not serve.

    asked: the caller asked for Triton; what is not checked is taken only then. wants_summary: as in Op.summarize.
    """
    if refusal := unsupported(x.k, x.v):
        return None, refusal
    if not x.causal:
        return None, "causal=False"
    if x.k.shape[-1] < MIN_KEY and x.v.is_cuda:
        return None, f"keys of {x.k.shape[-1]}: Triton takes at least {MIN_KEY}"
    if not (asked or _checked(x)):
        return None, "what has not been checked on such a GPU"
    op: Op[Any] = TritonDiagonal() if x.decay_class == Decay.DIAGONAL else TritonLinear()
    if isinstance(x, DeltaInputs):
        op = TritonDelta()
    if x.v.is_cuda and (lack := _make_ready(op, x, wants_summary)):
        return None, lack
    return op, ""


def in_blocks(x: LogLinearInputs) -> LogLinearInputs:
    """The same with columns of zeros, so that heads are blocks."""
    if unsupported(x.k, x.v):
        return x
    keys, values = (block_of(size) - size for size in (x.k.shape[-1], x.v.shape[-1]))
    if not (keys or values):
        return x
    return x.having({"q": pad(x.q, (0, keys)), "k": pad(x.k, (0, keys)), "v": pad(x.v, (0, values))})


def triton_log_linear_op(x: LogLinearInputs, asked: bool, wants_summary: bool) -> tuple[Op[Any] | None, str]:
    """The same for log-linear attention."""
    if refusal := unsupported(x.k, x.v):
        return None, refusal
    if not (asked or _checked(x)):
        return None, "what has not been checked on such a GPU"
    op: Op[Any] = TritonLogLinear()
    if isinstance(x, LogLinearDeltaInputs):
        op = TritonLogLinearDelta()
        if (size := x.k.shape[-1]) > MAX_DELTA_KEY:
            return None, f"a delta rule with keys of {size}: Triton takes at most {MAX_DELTA_KEY}"
    if x.v.is_cuda and (lack := _make_ready(op, x, wants_summary)):
        return None, lack
    return op, ""


def _make_ready(op: Op[Any], x: LinearInputs | LogLinearInputs, wants_summary: bool) -> str:
    """Compiles the kernels for such inputs side by side when the first come, forward and backward if that follows.
    Returns what the GPU lacks for them, if it does, and warns when the first come."""
    tensors = x.tensors
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    kinds = [(name, t.dtype, t.ndim, t.shape[2:]) for name, t in tensors.items()]
    key = (type(op), wants_summary, backward, x.v.device, x.segments.cu_seqlens is None, *kinds)
    if key not in _ready:
        _ready[key] = ""
        with torch.cuda.device(x.v.device):
            if lack := compile_ahead(lambda: dry_run(op, x, wants_summary, backward)):
                size = f"K = {x.k.shape[-1]}, V = {x.v.shape[-1]} in {x.v.dtype}"
                _ready[key] = f"heads of {size}: {lack}"
                warnings.warn(f"Triton's kernels do not fit into {x.v.device} for {_ready[key]}", stacklevel=2)
    return _ready[key]


def dry_run(op: Op[Any], x: Inputs, wants_summary: bool, backward: bool) -> None:
    """All launches that `x` and its gradients need, with tensors that have a shape and no memory."""
    offsets = x.segments.cu_seqlens
    if offsets is not None and offsets.is_cuda:
        offsets = offsets.to("meta")
    segments = Segments(x.segments.batch, x.segments.tokens, offsets)
    x = x.having({name: t.detach().to("meta") for name, t in x.tensors.items()}, segments)
    _, partial = op.summarize(x, wants_summary)
    comes = torch.empty(x.state_shape, dtype=x.state_dtype, device="meta") if wants_summary else None
    o, _, kept = op.finish(x, partial, Pending(lambda: comes))
    if backward:
        _, partial = op.summarize_grad(x, kept, o, wants_summary)
        op.finish_grad(x, kept, partial, Pending(lambda: comes))


def triton_step(x: LinearInputs, state: Tensor | None, asked: bool) -> tuple[Tensor, Tensor] | None:
    """o and the new states of a single token of which nobody wants a gradient, in one launch; None if it is not one."""
    if x.v.shape[1] != 1 or x.segments.cu_seqlens is not None or unsupported(x.k, x.v):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*x.tensors.values(), state)):
        return None
    if not (asked or _checked(x)):
        return None
    with torch.cuda.device_of(x.v):
        return decode(x, state)


def _checked(x: LinearInputs | LogLinearInputs) -> bool:
    """Whether the kernels have been compared with float64 on a GPU in their present form, for this dtype and size, and
    fit into this one's shared memory."""
    if not x.v.is_cuda:
        return False
    largest = MAX_HEAD // (2 if x.v.dtype == torch.float32 else 1) // (1 if is_roomy(x.v.device) else 2)
    return max(x.k.shape[-1], x.v.shape[-1]) <= largest
