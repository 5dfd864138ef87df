"""Softmax attention with its log-sum-exp, over blocks of queries and keys.

A `Pair` is a run of queries and a run of keys of one document; a whole sequence, packed documents and one step of a
ring are all lists of pairs. PyTorch's fused kernels serve the pairs that are full or plainly causal, and a dense
form in tiles serves the rest (windows, offsets that cut through a block).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels import checks

_TILE = 256  # rows of scores that the dense form holds at a time


@dataclass(frozen=True)
class Pair:
    """Rows of q and rows of k (along T) of one document; query i of the pair stands at key i + offset of it."""

    q: slice
    k: slice
    offset: int = 0


@dataclass(frozen=True)
class Mask:
    """Who sees whom within a document: position i sees j if j <= i (causal) and |i - j| < window."""

    scale: float
    causal: bool = True
    window: int | None = None
    fused: bool = True  # whether PyTorch's fused kernels may serve

    def is_full(self, offset: int, queries: int, keys: int) -> bool:
        """Every query of the pair sees every key."""
        ahead, behind = keys - 1 - offset, offset + queries - 1
        return (not self.causal or ahead <= 0) and (self.window is None or max(ahead, behind) < self.window)

    def is_plainly_causal(self, offset: int, queries: int) -> bool:
        """The triangle that fused kernels know."""
        return self.causal and offset == 0 and (self.window is None or self.window >= queries)

    def sees_any(self, offset: int, queries: int, keys: int) -> bool:
        """Some query of the pair sees some key."""
        ahead, behind = -(offset + queries - 1), offset - (keys - 1)  # of the nearest two
        return (not self.causal or ahead <= 0) and (self.window is None or max(ahead, behind) < self.window)

    def allowed(self, offset: int, rows: range, keys: int, device: torch.device) -> Tensor:
        """[rows, keys] booleans."""
        gap = torch.arange(rows.start, rows.stop, device=device)[:, None] + offset - torch.arange(keys, device=device)
        seen = gap >= 0 if self.causal else torch.ones_like(gap, dtype=torch.bool)
        return seen if self.window is None else seen & (gap.abs() < self.window)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o_i = Σ_j softmax_j(scale · q_i·k_j) v_j over the keys that query i sees.

    Args:
        q: [B, T, H, K].
        k, v: [B, S, Hkv, K], [B, S, Hkv, V]; query head h uses head h // (H // Hkv). S = T, or S > T without
            cu_seqlens: the queries are then the last T of S tokens (decoding with a key/value cache).
        scale: K ** -0.5 if None.
        causal: a token sees itself and what comes before.
        window: a token sees tokens less than `window` away, itself included.
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1.
        backend: "auto", or "reference" for the dense form everywhere.

    Returns:
        o [B, T, H, V] in q's dtype, and the log-sum-exp of the scaled scores, [B, T, H] in fp32 (fp64 for fp64).
        o is differentiable; the log-sum-exp is not.

    Raises:
        ValueError: shapes, dtypes, devices or cu_seqlens that do not fit, or a window below 1.
    """
    check_softmax(q, k, v, window)
    (batch, tokens), keys = q.shape[:2], k.shape[1]
    checks.cu_seqlens(cu_seqlens, batch, tokens)
    aligned = keys == tokens if cu_seqlens is not None else keys >= tokens
    checks.require(aligned, "k", f"{keys} tokens", f"{tokens} (or more, without cu_seqlens)")
    checks.require(backend in ("auto", "reference"), "backend", repr(backend), "'auto' or 'reference'")
    mask = Mask(checks.scale(scale, q.shape[-1]), causal, window, fused=backend == "auto")
    if cu_seqlens is None:
        return _SoftmaxAttention.apply(q, k, v, [Pair(slice(0, tokens), slice(0, keys), keys - tokens)], mask)
    return attend_packed(q, k, v, cu_seqlens.tolist(), mask)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], mask: Mask) -> tuple[Tensor, Tensor]:
    """o and log-sum-exp of documents that start at offsets[:-1]; differentiable in q, k, v."""
    pairs = [Pair(slice(a, b), slice(a, b)) for a, b in pairwise(offsets) if b > a]
    return _SoftmaxAttention.apply(q, k, v, pairs, mask)


def check_softmax(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> None:
    """Raises ValueError unless the tensors fit together."""
    checks.same_kind(q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.require(x.ndim == 4, name, f"{x.ndim} dimensions", "4: [B, T, heads, head size]")
    checks.require(q.shape[1] >= 1, "q", f"shape {list(q.shape)}", "at least one token")
    checks.shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "[B, S, Hkv, K] with q's B and K")
    checks.shape("v", v, (*k.shape[:3], v.shape[3]), "[B, S, Hkv, V] with k's B, S and heads")
    checks.require(q.shape[2] % k.shape[2] == 0, "q", f"{q.shape[2]} heads", f"a multiple of k's {k.shape[2]}")
    checks.require(q.dtype == k.dtype == v.dtype, "dtype", f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "the same for all")
    checks.require(window is None or window >= 1, "window", window, "at least 1, or None")


class Accumulator:
    """o [B, T, H, V] and its log-sum-exp [B, T, H] over all keys seen so far, in fp32 (fp64 for fp64)."""

    def __init__(self, q: Tensor, value_dim: int):
        dtype = accumulation_dtype(q)
        self.o = q.new_zeros(*q.shape[:3], value_dim, dtype=dtype)
        self.lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)

    def add(self, rows: slice, o: Tensor, lse: Tensor) -> None:
        """Merges a block's normalised output and log-sum-exp into these rows."""
        old = self.lse[:, rows]
        total = torch.logaddexp(old, lse)
        base = total.masked_fill(total == -torch.inf, 0)  # rows that have seen nothing yet stay zero
        self.o[:, rows] = self.o[:, rows] * (old - base).exp()[..., None] + o * (lse - base).exp()[..., None]
        self.lse[:, rows] = total


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attend(total: Accumulator, q: Tensor, k: Tensor, v: Tensor, pairs: list[Pair], mask: Mask) -> None:
    """Adds what q's rows see of these k and v."""
    for pair in pairs:
        o, lse = _block(q[:, pair.q], k[:, pair.k], v[:, pair.k], pair.offset, mask)
        total.add(pair.q, o, lse)


def attend_grad(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    pairs: list[Pair],
    mask: Mask,
) -> None:
    """Adds to grads = (dq, dk, dv), in the accumulation dtype; o and lse are those over all keys."""
    dq, dk, dv = grads
    for pair in pairs:
        rows, cols = pair.q, pair.k
        parts = _block_grad(
            do[:, rows], q[:, rows], k[:, cols], v[:, cols], o[:, rows], lse[:, rows], pair.offset, mask
        )
        for total, where, part in zip((dq, dk, dv), (rows, cols, cols), parts, strict=True):
            total[:, where] += part


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pairs, mask):
        total = Accumulator(q, v.shape[-1])
        attend(total, q, k, v, pairs, mask)
        o, ctx.pairs, ctx.mask = total.o.to(q.dtype), pairs, mask
        ctx.save_for_backward(q, k, v, o, total.lse)
        ctx.mark_non_differentiable(total.lse)
        return o, total.lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x)) for x in (q, k, v))
        attend_grad(do, q, k, v, o, lse, (dq, dk, dv), ctx.pairs, ctx.mask)
        return *(g.to(q.dtype) for g in (dq, dk, dv)), None, None


def _block(q: Tensor, k: Tensor, v: Tensor, offset: int, mask: Mask) -> tuple[Tensor, Tensor]:
    """o [B, Tq, H, V] and log-sum-exp [B, Tq, H] of one block."""
    triangle = mask.is_plainly_causal(offset, q.shape[1])
    if mask.fused and _has_fused(q, v) and (triangle or mask.is_full(offset, q.shape[1], k.shape[1])):
        heads = _by_head(q, k, v)
        if q.device.type == "cpu":
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, triangle, scale=mask.scale)
        else:
            o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, triangle, scale=mask.scale)
        return o.transpose(1, 2), lse.mT
    o, lse = zip(*(_dense(q, k, v, offset, rows, mask) for rows in _tiles(q.shape[1])), strict=True)
    return torch.cat(o, 1), torch.cat(lse, 1)


def _block_grad(do, q, k, v, o, lse, offset: int, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv that flow through one block, given o and log-sum-exp over all keys."""
    triangle = mask.is_plainly_causal(offset, q.shape[1])
    if mask.fused and _has_fused(q, v) and (triangle or mask.is_full(offset, q.shape[1], k.shape[1])):
        heads = _by_head(q, k, v)
        do_h, o_h, lse_h = do.transpose(1, 2), o.transpose(1, 2), lse.mT.contiguous()
        if q.device.type == "cpu":
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do_h, *heads, o_h, lse_h, 0.0, triangle, scale=mask.scale
            )
        else:
            no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                do_h, *heads, o_h, lse_h, None, None, q.shape[1], k.shape[1], 0.0, triangle, no_dropout, no_dropout[0],
                scale=mask.scale,
            )  # fmt: skip
        dq, dk, dv = (g.transpose(1, 2) for g in grads)
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        return dq, *(g.unflatten(2, groups).sum(3, dtype=accumulation_dtype(g)) for g in (dk, dv))
    parts = [_dense_grad(do, q, k, v, o, lse, offset, rows, mask) for rows in _tiles(q.shape[1])]
    dq, dk, dv = zip(*parts, strict=True)
    return torch.cat(dq, 1), sum(dk[1:], dk[0]), sum(dv[1:], dv[0])


def _has_fused(q: Tensor, v: Tensor) -> bool:
    if q.device.type == "cpu":
        return q.shape[-1] == v.shape[-1]
    half = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and half and q.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, D] each, k and v repeated for every query head."""
    group = q.shape[2] // k.shape[2]
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=2) for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _tiles(tokens: int) -> list[range]:
    return [range(start, min(start + _TILE, tokens)) for start in range(0, tokens, _TILE)]


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] -> [B, Hkv, H // Hkv, T, ...]."""
    return x.unflatten(2, (kv_heads, -1)).movedim(1, 3).to(dtype)


def _probabilities(q, k, offset: int, rows: range, mask: Mask) -> Tensor:
    """Scores of a tile of queries, -inf where unseen; q [B, Hkv, G, rows, K], k [B, Hkv, 1, S, K]."""
    unseen = ~mask.allowed(offset, rows, k.shape[-2], q.device)
    return (q @ k.mT * mask.scale).masked_fill(unseen, -torch.inf)


def _dense(q: Tensor, k: Tensor, v: Tensor, offset: int, rows: range, mask: Mask) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q)
    qt = _grouped(q[:, rows.start : rows.stop], k.shape[2], dtype)
    k, v = (_grouped(x, k.shape[2], dtype) for x in (k, v))
    s = _probabilities(qt, k, offset, rows, mask)
    lse = s.logsumexp(-1)
    o = (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v
    return o.movedim(3, 1).flatten(2, 3), lse.movedim(3, 1).flatten(2, 3)


def _dense_grad(do, q, k, v, o, lse, offset: int, rows: range, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
    dtype, heads, part = accumulation_dtype(q), k.shape[2], slice(rows.start, rows.stop)
    q, do, o, lse = (_grouped(x[:, part], heads, dtype) for x in (q, do, o, lse))
    k, v = (_grouped(x, heads, dtype) for x in (k, v))
    base = lse.masked_fill(lse == -torch.inf, 0)
    p = (_probabilities(q, k, offset, rows, mask) - base[..., None]).exp()
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * mask.scale
    dq, dk, dv = ds @ k, (ds.mT @ q).sum(2, keepdim=True), (p.mT @ do).sum(2, keepdim=True)
    return tuple(x.movedim(3, 1).flatten(2, 3) for x in (dq, dk, dv))
