"""The kernels that serve one block of softmax attention: PyTorch's fused ones, and a dense form for the rest.

A kernel takes the rows of its block: q, do, o [B, Tq, H, K or V], k, v [B, Tk, Hkv, K or V] and lse [B, Tq, H].
`forward` returns o, normalised over the block's keys, and the log-sum-exp; `backward` takes both over all keys, and
returns dq, dk, dv. Called directly, PyTorch's kernels do not check strides, so their tensors have contiguous rows.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lasp.kernels.blocks import Block, Mask
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.lasting import kept
from lasp.kernels.layouts import in_rows
from lasp.kernels.parked import index_tensor

_TILE = 256  # rows of scores that the dense form holds at a time
_LONG = 2048  # tokens from which on cuDNN is worth the time that it takes to plan for a new length

aten = torch.ops.aten


class Kernel(Protocol):
    """What every kernel has: `forward` and `backward` as described above."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]: ...

    @staticmethod
    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def calls(block: Block, q: Tensor, v: Tensor, mask: Mask) -> list[tuple[Block, type[Kernel]]]:
    """The block in the pieces that one kernel call each serves, with the kernels."""
    plain = block.is_full or block.is_triangle
    alone = len(block.q) == 2
    if mask.fused and q.shape[0] > 0 and q.shape[-1] == v.shape[-1]:
        if q.device.type == "cpu" and plain:
            return [(segment, FlashCPU) for segment in block.segments]
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
            planned = alone and mask.comes_again(block) and min(block.queries, block.keys) >= _LONG
            same_bits = torch.are_deterministic_algorithms_enabled()
            if plain and planned and q.shape[-1] <= 128 and _prefers_cudnn(q.device) and not same_bits:
                return [(block, CuDNN)]
            if _flash_serves(q.shape[-1], q.device):
                return [(piece, Flash) for piece in ([block] if alone or q.shape[0] == 1 else block.segments)]
    return [(segment, Dense) for segment in block.segments]


@cache
def _prefers_cudnn(device: torch.device) -> bool:
    """From Hopper on, where PyTorch's flash attention leaves much of the speed unused."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _flash_serves(size: int, device: torch.device) -> bool:
    """Heads of this size; its backward lacks some on GPUs with little shared memory, as PyTorch's own front knows."""
    capability = torch.cuda.get_device_capability(device)
    small = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return capability >= (8, 0) and size <= 256 and not (small and 192 < size <= 224)


class FlashCPU:
    """PyTorch's flash attention for CPUs: one segment, full or a triangle."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        heads = FlashCPU._by_head(q, k, v)
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, not block.is_full, scale=scale)
        return o.transpose(1, 2), lse.mT

    @staticmethod
    def backward(do, q, k, v, o, lse, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        heads = FlashCPU._by_head(q, k, v)
        do, o = (in_rows(x).transpose(1, 2) for x in (do, o))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, *heads, o, lse.mT.contiguous(), 0.0, not block.is_full, scale=scale
        )
        dq, dk, dv = (g.transpose(1, 2) for g in grads)
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        dk, dv = (g.unflatten(2, groups).sum(3, dtype=accumulation_dtype(g)) for g in (dk, dv))
        return dq, dk, dv

    @staticmethod
    def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, T, D] each, k and v repeated for every query head."""
        group, (q, k, v) = q.shape[2] // k.shape[2], map(in_rows, (q, k, v))
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class CuDNN:
    """cuDNN's attention: one segment, full or a triangle; heads are grouped in the kernel, strides are free."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        heads = (in_rows(x).transpose(1, 2) for x in (q, k, v))
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, not block.is_full, False, scale=scale
        )
        return o.transpose(1, 2), lse.flatten(2).mT  # lse [B, H, Tq, 1]

    @staticmethod
    def backward(do, q, k, v, o, lse, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        do_h, q_h, k_h, v_h, o_h = (in_rows(x).transpose(1, 2) for x in (do, q, k, v, o))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do_h, q_h, k_h, v_h, o_h, lse.mT.contiguous()[..., None], seed, seed, None, None, None,
            q.shape[1], k.shape[1], 0.0, not block.is_full, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (g.transpose(1, 2) for g in grads)
        return dq, dk, dv


class Flash:
    """PyTorch's FlashAttention 2 or what its user activated: any block; several segments (then B = 1) in one call."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        packed = len(block.q) > 2
        q, k, v = (x[0] if packed else x for x in map(in_rows, (q, k, v)))
        cuts, bounds = Flash._arguments(block, q.device)
        o, lse, *_ = aten._flash_attention_forward(q, k, v, *cuts, 0.0, False, False, scale=scale, **bounds)
        return (o[None], lse.mT[None]) if packed else (o, lse.mT)  # lse [H, Tq] or [B, H, Tq]

    @staticmethod
    def backward(do, q, k, v, o, lse, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        packed = len(block.q) > 2
        lse = lse.mT.contiguous()
        do, q, k, v, o, lse = (x[0] if packed else x for x in (*map(in_rows, (do, q, k, v, o)), lse))
        cuts, bounds = Flash._arguments(block, q.device)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            do, q, k, v, o, lse, *cuts, 0.0, False, no_dropout, no_dropout[0], scale=scale, **bounds
        )
        dq, dk, dv = (g[None] if packed else g for g in grads)
        return dq, dk, dv

    @staticmethod
    def _arguments(block: Block, device: torch.device) -> tuple[tuple, dict[str, int]]:
        """Cumulative lengths with the longest ones, and the window in which the causal mask is the case right = 0."""
        cuts: list[Tensor | None] = [None, None]
        if len(block.q) > 2:
            cuts = [_offsets(block.q, device), _offsets(block.k, device)]
        unbounded = -1
        return (*cuts, block.queries, block.keys), {
            "window_size_left": unbounded if block.left is None else block.left,
            "window_size_right": unbounded if block.right is None else block.right,
        }


@kept(64)
def _transfer(cuts: tuple[int, ...], device: torch.device) -> Tensor:
    return index_tensor(cuts, device, torch.int32)


def _offsets(cuts: tuple[int, ...], device: torch.device) -> Tensor:
    """From 0, int32."""
    return _transfer(tuple(cut - cuts[0] for cut in cuts), device)


class Dense:
    """All scores of a tile of queries at once, in the accumulation dtype: one segment, any mask, size and dtype."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        dtype, heads = accumulation_dtype(q), k.shape[2]
        k, v = (_grouped(x, heads, dtype) for x in (k, v))
        parts = []
        for rows in _tiles(q.shape[1]):
            s = _scores(_grouped(q[:, rows.start : rows.stop], heads, dtype), k, rows, block, scale)
            lse = s.logsumexp(-1)
            o = (s - lse[..., None]).exp() @ v
            parts.append((_flat(o), _flat(lse)))
        outputs, sums = zip(*parts, strict=True)
        return torch.cat(outputs, 1), torch.cat(sums, 1)

    @staticmethod
    def backward(do, q, k, v, o, lse, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        dtype, heads = accumulation_dtype(q), k.shape[2]
        k, v = (_grouped(x, heads, dtype) for x in (k, v))
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for rows in _tiles(q.shape[1]):
            part = slice(rows.start, rows.stop)
            qt, dot, ot, lset = (_grouped(x[:, part], heads, dtype) for x in (q, do, o, lse))
            p = (_scores(qt, k, rows, block, scale) - lset[..., None]).exp()
            ds = p * (dot @ v.mT - (dot * ot).sum(-1, keepdim=True)) * scale
            dq.append(_flat(ds @ k))
            dk += (ds.mT @ qt).sum(2, keepdim=True)
            dv += (p.mT @ dot).sum(2, keepdim=True)
        return torch.cat(dq, 1), _flat(dk), _flat(dv)


def _tiles(tokens: int) -> list[range]:
    return [range(start, min(start + _TILE, tokens)) for start in range(0, tokens, _TILE)]


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] -> [B, Hkv, H // Hkv, T, ...]."""
    return x.unflatten(2, (kv_heads, -1)).movedim(1, 3).to(dtype)


def _flat(x: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.movedim(3, 1).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, rows: range, block: Block, scale: float) -> Tensor:
    """Of a tile of queries, -inf where unseen; q [B, Hkv, G, rows, K], k [B, Hkv, 1, S, K]."""
    return (q @ k.mT * scale).masked_fill(~block.allowed(rows, q.device), -torch.inf)
