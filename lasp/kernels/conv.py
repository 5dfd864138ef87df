"""Causal depthwise convolution along the sequence (math §6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels import checks, fused
from lasp.kernels.autocast import exempt
from lasp.kernels.segments import Segments


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y_t = bias + Σ_i weight[:, i] x_{t - (width - 1) + i}, nothing read from before the sequence (document).

    Args:
        x: [B, T, D].
        weight: [D, width]; its last column multiplies the token itself. A token shift is the case width = 2.
        bias: [D].
        initial_tail: [N, width - 1, D], the tokens before each of the N sequences, in x's dtype; zeros if None.
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1.

    Returns:
        y [B, T, D] in x's dtype; differentiable in everything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or cu_seqlens that do not end at T.
    """
    check_conv(x, weight, bias)
    batch, tokens, channels = x.shape
    checks.cu_seqlens(cu_seqlens, batch, tokens)
    segments = Segments(batch, tokens, cu_seqlens)
    if initial_tail is not None:
        checks.tensor("initial_tail", initial_tail)
        expected = (segments.count, weight.shape[1] - 1, channels)
        checks.shape("initial_tail", initial_tail, expected, "[N, width - 1, D]")
        checks.require(initial_tail.dtype == x.dtype, "initial_tail", f"dtype {initial_tail.dtype}", f"{x.dtype}, as x")
    return convolve(x, weight, bias, initial_tail, segments)


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless the tensors fit together."""
    checks.same_kind({"x": x, "weight": weight}, bias=bias)
    checks.require(x.ndim == 3 and x.shape[1] >= 1, "x", f"shape {list(x.shape)}", "[B, T, D] with at least one token")
    checks.require(weight.ndim == 2, "weight", f"shape {list(weight.shape)}", "[D, width]")
    checks.shape("weight", weight, (x.shape[2], weight.shape[1]), "[D, width]")
    if bias is not None:
        checks.shape("bias", bias, (x.shape[2],), "[D]")


@exempt
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, segments: Segments) -> Tensor:
    """The convolution over any segments; tail [N, width - 1, D] or None."""
    channels, width = x.shape[2], weight.shape[1]
    if tail is None:
        tail = x.new_zeros(segments.count, width - 1, channels)
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if segments.cu_seqlens is None:
        return _depthwise(torch.cat([tail, x], dim=1), weight, bias)
    # Every segment behind its tail, in one row: [tail, segment, tail, segment, …]. The output lacks the first tail, so
    # that segments' outputs come in order, and between them width - 1 windows that straddle two segments.
    lengths = segments.offsets.diff().tolist()
    pieces = [part for n, segment in enumerate(x[0].split(lengths)) for part in (tail[n], segment)]
    row = _depthwise(torch.cat(pieces)[None], weight, bias)[0]
    return torch.cat(row.split([part for n in lengths for part in (n, width - 1)][:-1])[::2])[None]


def _depthwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, T + width - 1, D], weight [D, width] -> [B, T, D]."""
    if fused.is_large(rows):  # GPUs' libraries want channels before tokens, and are slow with a filter for each channel
        return shifted_sum(rows, weight, bias)
    return F.conv1d(rows.mT, weight[:, None], bias, groups=rows.shape[2]).mT


@fused.fused
def shifted_sum(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as it is written, summed in float32 at least."""
    wide, tokens = torch.promote_types(rows.dtype, torch.float32), rows.shape[1] - weight.shape[1] + 1
    y = torch.zeros_like(rows[:, :tokens], dtype=wide) if bias is None else bias.to(wide)
    for i, column in enumerate(weight.unbind(1)):
        y = y + rows[:, i : i + tokens].to(wide) * column.to(wide)
    return y.to(rows.dtype)
