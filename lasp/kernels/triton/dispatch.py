"""Which Triton op serves which inputs."""

import torch

from lasp.kernels.recurrence import Inputs, Op
from lasp.kernels.triton.config import unsupported
from lasp.kernels.triton.delta import TritonDelta
from lasp.kernels.triton.diagonal import TritonDiagonal
from lasp.kernels.triton.linear import TritonLinear

MAX_DELTA_HEAD = 128


def triton_op(x: Inputs, causal: bool, asked: bool) -> tuple[Op | None, str]:
    """The op, or None and what it is that Triton's ops do not serve.

    asked: the caller asked for Triton. What has not been checked on a GPU in its present form is taken only then:
    diagonal decays, the delta rule, and other dtypes than bfloat16 or heads of more than 128.
    """
    if refusal := unsupported(x.k, x.v):
        return None, refusal
    if not causal:
        return None, "causal=False"
    diagonal = x.decay is not None and x.decay.ndim == 4
    if x.beta is None and not diagonal:
        checked = x.v.dtype == torch.bfloat16 and max(x.k.shape[-1], x.v.shape[-1]) <= 128
        return (TritonLinear() if asked or checked else None), "other dtypes than bfloat16, or heads of more than 128"
    if x.beta is None:
        return (TritonDiagonal() if asked else None), "a decay [B, T, H, K]"
    if max(x.k.shape[-1], x.v.shape[-1]) > MAX_DELTA_HEAD:
        return None, f"the delta rule with heads of more than {MAX_DELTA_HEAD}"
    return (TritonDelta() if asked else None), "the delta rule"
