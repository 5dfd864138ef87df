"""Softmax attention with its log-sum-exp, over blocks of queries and keys (see `lasp.kernels.blocks`).

Blocks are computed by fused kernels where there is one (see `lasp.kernels.attention`), and merged by their log-sum-exps
in fp32 (fp64 for fp64).
"""

from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.attention import calls
from lasp.kernels.blocks import Block, Mask, string
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.once import once
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.traced import traced


def like_output(q: Tensor, v: Tensor, **others: object) -> list[Tensor]:
    """An empty tensor like o."""
    return [q.new_empty(*q.shape[:3], v.shape[3])]


def _like_results(q: Tensor, v: Tensor, **others: object) -> list[Tensor]:
    return [*like_output(q, v), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))]


@traced(_like_results, reads=(0, 1), casts=autocast.cast)
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
        scale: above 0; K ** -0.5 if None.
        causal: a token sees itself and what comes before.
        window: a token sees tokens less than `window` away, itself included.
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1.
        backend: "auto", or "reference" for the dense form everywhere.

    Returns:
        o [B, T, H, V] in q's dtype, and the log-sum-exp of the scaled scores, [B, T, H] in fp32 (fp64 for fp64).
        o is differentiable once; the log-sum-exp is not.

    Raises:
        ValueError: shapes, dtypes, devices or cu_seqlens that do not fit, or a window below 1.
    """
    q, k, v = autocast.cast(q, k, v)
    check_softmax(q, k, v, causal, window)
    (batch, tokens), keys = q.shape[:2], k.shape[1]
    checks.cu_seqlens(cu_seqlens, batch, tokens)
    aligned = keys == tokens if cu_seqlens is not None else keys >= tokens
    checks.require(aligned, "k", f"{keys} tokens", f"{tokens} (or more, without cu_seqlens)")
    checks.require(backend in ("auto", "reference"), "backend", repr(backend), "'auto' or 'reference'")
    scale = checks.softmax_scale(scale, q.shape[-1])
    mask = Mask(scale, causal, window, fused=backend == "auto", recurring=1 if cu_seqlens is None else tokens)
    if cu_seqlens is None:
        block = mask.block(slice(0, tokens), slice(0, keys), keys - tokens)
        blocks = [] if block is None else [block]
    else:
        blocks = document_blocks(cu_seqlens.tolist(), mask)
    return _SoftmaxAttention.apply(q, k, v, blocks, mask)


def document_blocks(offsets: list[int], mask: Mask) -> list[Block]:
    """Those of documents that start at offsets[:-1]."""
    blocks = [mask.block(slice(a, b), slice(a, b), 0) for a, b in pairwise(offsets) if b > a]
    return string([block for block in blocks if block is not None])


def check_softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> None:
    """Raises ValueError unless the tensors fit together."""
    checks.same_kind({"q": q, "k": k, "v": v})
    checks.rows(q=q, k=k, v=v)
    checks.shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]), "[B, S, Hkv, K] with q's B and K")
    checks.shape("v", v, (*k.shape[:3], v.shape[3]), "[B, S, Hkv, V] with k's B, S and heads")
    checks.require(q.shape[2] % k.shape[2] == 0, "q", f"{q.shape[2]} heads", f"a multiple of k's {k.shape[2]}")
    checks.require(q.dtype == k.dtype == v.dtype, "dtype", f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "the same for all")
    checks.flag("causal", causal)
    if window is not None:
        checks.number("window", window, Integral, "at least 1, or None")
        checks.require(window >= 1, "window", window, "at least 1, or None")


class Accumulator:
    """o [B, T, H, V] and its log-sum-exp [B, T, H] over the keys seen so far, in fp32 (fp64 for fp64).

    What a first block gives for all rows is held as it came, so that a block alone costs nothing more.
    """

    def __init__(self, q: Tensor, value_dim: int):
        self.q, self.value_dim = q, value_dim
        self.held: tuple[Tensor, Tensor] | None = None

    def add(self, rows: slice, o: Tensor, lse: Tensor) -> None:
        """Merges a block's normalised output and log-sum-exp, all finite, into these rows.

        o' = o + w (o_block - o), w = sigmoid(lse_block - lse); lse' = log(exp lse + exp lse_block).
        """
        dtype = accumulation_dtype(self.q)
        lse = lse.to(dtype)
        if self.held is None and o.shape[1] == self.q.shape[1]:
            self.held = o, lse
            return
        whole, sums = self.held or self._nothing()
        self.held = whole.to(dtype), sums
        old_o, old_lse = (x[:, rows] for x in self.held)
        old_o.lerp_(o.to(dtype), (lse - old_lse).sigmoid()[..., None])
        old_lse.copy_(torch.logaddexp(old_lse, lse))

    def result(self) -> tuple[Tensor, Tensor]:
        """o in q's dtype, and the log-sum-exp; 0 and -inf where nothing was seen."""
        o, lse = self.held or self._nothing()
        return o.to(self.q.dtype), lse

    def _nothing(self) -> tuple[Tensor, Tensor]:
        shape, dtype = self.q.shape[:3], accumulation_dtype(self.q)
        return self.q.new_zeros(*shape, self.value_dim, dtype=dtype), self.q.new_full(shape, -torch.inf, dtype=dtype)


class Sum:
    """The sum of gradients [B, T, H, D], of which a block gives some rows; in fp32 (fp64 for fp64) from two blocks on.

    like: what they are the gradient of. total: where to add them up, if it is there already.
    """

    def __init__(self, like: Tensor, total: Tensor | None = None):
        self.like, self.total = like, total

    def add(self, rows: slice, part: Tensor) -> None:
        if self.total is None and part.shape[1] == self.like.shape[1]:
            self.total = part
            return
        total = zeros_like(self.like) if self.total is None else self.total
        self.total = total.to(accumulation_dtype(self.like))
        self.total[:, rows] += part

    def result(self) -> Tensor:
        """In the dtype of `like`."""
        return torch.zeros_like(self.like) if self.total is None else self.total.to(self.like.dtype)


def zeros_like(x: Tensor) -> Tensor:
    """Contiguous, in the accumulation dtype."""
    return x.new_zeros(x.shape, dtype=accumulation_dtype(x))


def attend(total: Accumulator, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], mask: Mask) -> None:
    """Adds what q's rows see of these k and v."""
    for block in blocks:
        for piece, kernel in calls(block, q, v, mask):
            rows, cols = piece.rows, piece.cols
            total.add(rows, *kernel.forward(q[:, rows], k[:, cols], v[:, cols], piece, mask.scale))


def attend_grad(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    grads: tuple[Sum, Sum, Sum],
    blocks: list[Block],
    mask: Mask,
) -> None:
    """Adds to grads = (dq, dk, dv); o and lse are those over all keys."""
    for block in blocks:
        for piece, kernel in calls(block, q, v, mask):
            rows, cols = piece.rows, piece.cols
            inputs = do[:, rows], q[:, rows], k[:, cols], v[:, cols], o[:, rows], lse[:, rows]
            parts = kernel.backward(*inputs, piece, mask.scale)
            for total, where, part in zip(grads, (rows, cols, cols), parts, strict=True):
                total.add(where, part)


def _attended(q: Tensor, k: Tensor, v: Tensor, blocks: list[Block], mask: Mask) -> tuple[Tensor, Tensor]:
    total = Accumulator(q, v.shape[-1])
    attend(total, q, k, v, blocks, mask)
    return total.result()


class _SoftmaxAttention(autocast.Function):
    @staticmethod
    def forward(ctx, q, k, v, blocks, mask):
        o, lse = once(lambda: _attended(q, k, v, blocks, mask))
        ctx.blocks, ctx.mask = blocks, mask
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, o, lse = ctx.saved_tensors
        grads = Sum(q), Sum(k), Sum(v)
        attend_grad(do, q, k, v, o, lse, grads, ctx.blocks, ctx.mask)
        return *(total.result() for total in grads), None, None
