"""Causal depthwise convolution along the sequence (math §6)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.autocast import exempt
from lasp.kernels.linear import Backend
from lasp.kernels.parts import Parts, activate, undivided, whole
from lasp.kernels.segments import Segments
from lasp.kernels.traced import traced


def like_input(x: Tensor, **others: object) -> list[Tensor]:
    """An empty tensor like y."""
    return [torch.empty_like(x, memory_format=torch.contiguous_format)]


def like_parts(x: Tensor, parts: Parts, **others: object) -> list[Tensor]:
    """Empty tensors like those of the parts."""
    return [x.new_empty(*x.shape[:2], parts.heads, part.size) for part in parts.parts]


@traced(like_input)
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
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1. Their values are looked at where they
            are on the CPU, as those of `linear_attention` are.

    Returns:
        y [B, T, D] in x's dtype; differentiable in everything. Sums are in fp32 (fp64 for fp64) on a GPU.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or cu_seqlens that do not end at T.
    """
    check_conv(x, weight, bias)
    segments = _segments(x, weight, initial_tail, cu_seqlens)
    return whole(convolve(x, weight, bias, initial_tail, segments, False, undivided(x)))


def check_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless the tensors fit together."""
    checks.same_kind({"x": x, "weight": weight}, bias=bias)
    fits = x.ndim == 3 and 0 not in x.shape[1:]
    checks.require(fits, "x", f"shape {list(x.shape)}", "[B, T, D] with at least one token and channel")
    fits = weight.ndim == 2 and weight.shape[1] >= 1
    checks.require(fits, "weight", f"shape {list(weight.shape)}", "[D, width], width at least 1")
    checks.shape("weight", weight, (x.shape[2], weight.shape[1]), "[D, width]")
    if bias is not None:
        checks.shape("bias", bias, (x.shape[2],), "[D]")


@traced(like_parts)
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: Parts,
    *,
    initial_tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """SiLU(causal_conv1d(x, …)) and its channels divided: the short convolution of a layer, in one kernel on a GPU.

    Args:
        parts: a tensor [B, T, heads, size] of each is returned, contiguous, in x's dtype.
        The others are those of `causal_conv1d`, D being parts.channels.

    Raises:
        ValueError: as `causal_conv1d`, or if parts have not D channels.
    """
    check_conv(x, weight, bias)
    check_parts(x, parts)
    return convolve(x, weight, bias, initial_tail, _segments(x, weight, initial_tail, cu_seqlens), True, parts)


def check_parts(x: Tensor, parts: Parts) -> None:
    """Raises ValueError unless all channels are part of one."""
    checks.require(isinstance(parts, Parts), "parts", f"a {type(parts).__name__}", "a Parts")
    sizes = [part.size for part in parts.parts]
    checks.require(min(sizes, default=0) >= 1, "parts", f"sizes {sizes}", "at least one channel in each")
    checks.require(parts.channels == x.shape[2], "parts", f"{parts.channels} channels", f"x's {x.shape[2]}")


def _segments(x: Tensor, weight: Tensor, tail: Tensor | None, cu_seqlens: Tensor | None) -> Segments:
    batch, tokens, channels = x.shape
    checks.cu_seqlens(cu_seqlens, batch, tokens, copy=False)
    segments = Segments(batch, tokens, cu_seqlens)
    if tail is not None:
        checks.tensor("initial_tail", tail)
        checks.shape("initial_tail", tail, (segments.count, weight.shape[1] - 1, channels), "[N, width - 1, D]")
        checks.require(tail.dtype == x.dtype, "initial_tail", f"dtype {tail.dtype}", f"{x.dtype}, as x")
        checks.require(tail.device == x.device, "initial_tail", f"device {tail.device}", f"{x.device}, as x")
    return segments


@exempt
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    segments: Segments,
    silu: bool,
    parts: Parts,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """The convolution over any segments, and what becomes of its channels; tail [N, width - 1, D] or None.

    On a GPU one Triton kernel in each direction, which keeps its inputs alone.
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if backend == "triton" or (backend == "auto" and x.is_cuda and x.dtype != torch.float64):
        from lasp.kernels.triton.conv import Convolution

        return Convolution.apply(x, weight, bias, tail, segments, silu, parts)
    return activate(_convolved(x, weight, bias, tail, segments), silu, parts)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, segments: Segments) -> Tensor:
    channels, width = x.shape[2], weight.shape[1]
    if tail is None:
        tail = x.new_zeros(segments.count, width - 1, channels)
    if segments.count == 0:  # with nothing in them, but a graph: other ranks may have some, and wait for its gradients
        return _depthwise(torch.cat([tail, x.reshape(0, 1, channels)], dim=1), weight, bias).view_as(x)
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
    return F.conv1d(rows.mT, weight[:, None], bias, groups=rows.shape[2]).mT
