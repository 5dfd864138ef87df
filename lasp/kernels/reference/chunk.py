"""The specification in chunks: what runs on a CPU, and what the device kernels are measured against.

Within a chunk of C tokens every class is the same affine map of the state X that enters it (math §1, §2):

    o = R X + Y        outputs: R [C, K] is what they read of X, Y [C, V] what they read of the chunk itself
    X' = A X + S       the outgoing state: A, S is the chunk's summary

The delta family differs only in its pseudo-values u = U - W X (the WY form); everywhere else U = v and W = 0.
A decay is summed within a chunk in float64: a gate that is nearly shut would leave no digits of the others in a sum of
fp32, and weights are differences of sums.

Across chunks the states are scanned; backward scans D = Rᵀ do the other way, and the gradients of R, Y, A, S follow
from those of o and X'. What remains is local to the chunk and left to autograd.
"""

import torch
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.inputs import LinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Finished, Gradients, Kept
from lasp.kernels.segments import Chunks
from lasp.kernels.summary import SHUT, Summary, Transition, apply, apply_transposed, as_matrix, factor_of

CHUNK = 64
CHUNK_DIAGONAL = 16  # exp(b_i - b_j) of every pair and channel is formed: safe for any gate, but C times the size of k


class ChunkedOp:
    """linear_attention and delta_rule: `beta` makes the difference."""

    def summarize(self, x: LinearInputs, wanted: bool):
        chunks = _chunks(x)
        q, k, v, b, beta = _local(x, _leaves(x, chunks), chunks)
        a, s, u, w = write(k, v, b, beta)
        summary = Summary(_scan(chunks, a, s, _zero(x))[1], _total(chunks, a, _zero(x))) if wanted else None
        return summary, (chunks, a, s, (q, k, b, u, w))

    def finish(self, x: LinearInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        chunks, a, s, local = partial
        r, y = read(*local)
        start = incoming.wait()
        start = _zero(x) if start is None else start
        initial, final = _scan(chunks, a, s, start)
        return chunks.join(r @ initial + y, x.v).to(x.v.dtype), Pending(lambda: final), (start,)

    def summarize_grad(self, x: LinearInputs, kept: Kept, do: Tensor, wanted: bool):
        chunks = _chunks(x)
        leaves = {name: t.detach().requires_grad_() for name, t in _leaves(x, chunks).items()}
        with torch.enable_grad():
            q, k, v, b, beta = _local(x, leaves, chunks)
            a, s, u, w = write(k, v, b, beta)
            r, y = read(q, k, b, u, w)
        do = chunks.split(do).to(x.state_dtype)
        d = r.detach().mT @ do
        total = _scan_back(chunks, None if a is None else a.detach(), d, _zero(x))[1] if wanted else None
        return total, (chunks, leaves, (r, y, a, s), do, d)

    def finish_grad(self, x: LinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        chunks, leaves, (r, y, a, s), do, d = partial
        (incoming,) = kept
        assert incoming is not None
        a_value = None if a is None else a.detach()
        initial, _ = _scan(chunks, a_value, s.detach(), incoming)
        end = d_outgoing.wait()
        d_final, d_incoming = _scan_back(chunks, a_value, d, _zero(x) if end is None else end)
        outputs, grads = [r, y, s], [do @ initial.mT, do, d_final]
        if a_value is not None and a.requires_grad:
            outputs.append(a)
            grads.append(_transition_grad(a_value, initial, d_final))
        found = zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads), strict=True)
        of = {name: chunks.join(d, x.v).to(getattr(x, name).dtype) for name, d in found}
        return Gradients(of, Pending(lambda: d_incoming))


class NonCausalOp:
    """linear_attention with causal=False: every token reads the state of its whole segment, and there is no decay."""

    def summarize(self, x: LinearInputs, wanted: bool):
        chunks = _chunks(x)
        q, k, v, _, _ = _local(x, _leaves(x, chunks), chunks)
        s = _sum_over_chunks(chunks, k.mT @ v, x)
        return Summary(s), (chunks, q, s)

    def finish(self, x: LinearInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        chunks, q, s = partial
        others = incoming.wait()
        state = s if others is None else s + others
        return chunks.join(q @ state[chunks.owner], x.v).to(x.v.dtype), Pending(lambda: state), (state,)

    def summarize_grad(self, x: LinearInputs, kept: Kept, do: Tensor, wanted: bool):
        chunks = _chunks(x)
        local = _local(x, _leaves(x, chunks), chunks)
        do = chunks.split(do).to(x.state_dtype)
        d = _sum_over_chunks(chunks, local[0].mT @ do, x)
        return d, (chunks, local, do, d)

    def finish_grad(self, x: LinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        chunks, (_, k, v, _, _), do, d = partial
        others = d_outgoing.wait()
        d = d if others is None else d + others
        (state,) = kept
        assert state is not None
        state, d_state = state[chunks.owner], d[chunks.owner]
        groups = (x.q.shape[2], x.v.shape[2] // x.q.shape[2])
        dq = (do @ state.mT * x.scale).unflatten(1, groups).sum(2)
        dk = (v @ d_state.mT).unflatten(1, groups).sum(2)
        dq, dk, dv = (chunks.join(t, x.v).to(x.v.dtype) for t in (dq, dk, k @ d_state))
        return Gradients({"q": dq, "k": dk, "v": dv}, Pending(lambda: d))


def write(k: Tensor, v: Tensor, b: Tensor | None, beta: Tensor | None):
    """A, S and the pseudo-values' U, W (u = U - W X) of each chunk; k, v [M, H, C, ·], b the cumulative log decay."""
    u, w = v, None
    if beta is not None:
        lower = scores(k, k, b, strict=True) * beta[..., None]
        u, w = torch.linalg.solve_triangular(
            lower, torch.cat([v, _decayed(k, b)], -1) * beta[..., None], upper=False, unitriangular=True
        ).split([v.shape[-1], k.shape[-1]], dim=-1)
    k_out = k if b is None else _decayed(k, b[:, :, -1:] - b)
    a = None if b is None else b[:, :, -1].to(k.dtype)
    if w is not None:
        a = as_matrix(a, k) - k_out.mT @ w
    return a, k_out.mT @ u, u, w


def read(q: Tensor, k: Tensor, b: Tensor | None, u: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """R and Y of each chunk."""
    p = scores(q, k, b)
    r = _decayed(q, b)
    return r if w is None else r - p @ w, p @ u


def scores(q: Tensor, k: Tensor, b: Tensor | None, strict: bool = False) -> Tensor:
    """Σ_d q_i k_j exp(b_i - b_j) for j <= i (j < i if strict), zero elsewhere; [M, H, C, C]."""
    c = k.shape[2]
    seen = torch.ones(c, c, dtype=torch.bool, device=k.device).tril(-1 if strict else 0)
    if b is None:
        return (q @ k.mT) * seen
    if Transition.of(b, k[..., None]) == Transition.SCALAR:
        return (q @ k.mT) * _between(b, k.dtype).masked_fill(~seen, -torch.inf).exp()
    gap = _between(b, k.dtype).masked_fill(~seen[:, :, None], -torch.inf)
    return torch.einsum("mhik,mhjk,mhijk->mhij", q, k, gap.exp())


def _between(b: Tensor, dtype: torch.dtype) -> Tensor:
    """b_i - b_j, [M, H, C, C] or [M, H, C, C, K]; that of a token with itself has no gradient, in which what nearly
    closed gates have would be lost."""
    own = torch.eye(b.shape[2], dtype=torch.bool, device=b.device)
    gap = (b[:, :, :, None] - b[:, :, None]).to(dtype)
    return gap.masked_fill(own if gap.ndim == 4 else own[..., None], 0.0)


def _decayed(x: Tensor, b: Tensor | None) -> Tensor:
    """x [M, H, C, K] times exp(b), b [M, H, C] or [M, H, C, K]."""
    factor = factor_of(None if b is None else b.to(x.dtype), x[..., None])
    return x if factor is None else x * factor[..., 0]


def _chunks(x: LinearInputs) -> Chunks:
    return x.segments.chunks(CHUNK_DIAGONAL if x.decay_class == Decay.DIAGONAL else CHUNK, x.v.device)


def _leaves(x: LinearInputs, chunks: Chunks) -> dict[str, Tensor]:
    """What has a gradient, in chunks and in the dtype of the state."""
    return {name: chunks.split(t).to(x.state_dtype) for name, t in x.per_token.items()}


def _local(x: LinearInputs, leaves: dict[str, Tensor], chunks: Chunks):
    """Scaled q, k (one per value head), v, cumulative log decay within the chunk in float64, beta."""
    q, k, v = leaves["q"] * x.scale, leaves["k"], leaves["v"]
    q, k = (t.repeat_interleave(x.v.shape[2] // t.shape[1], dim=1) for t in (q, k))
    g = leaves.get("decay")
    if x.decay is not None and g is None:  # constant; empty slots must not decay the state
        g = x.decay.to(x.state_dtype)[None, :, None].where(chunks.mask[:, None], 0)
    b = None if g is None else g.clamp(min=SHUT[x.state_dtype]).double().cumsum(2)
    return q, k, v, b, leaves.get("beta")


def _scan(chunks: Chunks, a: Tensor | None, s: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
    """The initial state of each chunk [M, H, K, V] and the segments' final ones [N, H, K, V]."""
    initial, state = torch.empty_like(s), incoming.clone()
    for segment, chunk in chunks.steps:
        initial[chunk] = state[segment]
        state[segment] = apply(None if a is None else a[chunk], state[segment]) + s[chunk]
    return initial, state


def _scan_back(chunks: Chunks, a: Tensor | None, d: Tensor, d_outgoing: Tensor) -> tuple[Tensor, Tensor]:
    """The mirror image: the gradient of each chunk's final state and of the segments' initial ones."""
    d_final, grad = torch.empty_like(d), d_outgoing.clone()
    for segment, chunk in reversed(chunks.steps):
        d_final[chunk] = grad[segment]
        grad[segment] = apply_transposed(None if a is None else a[chunk], grad[segment]) + d[chunk]
    return d_final, grad


def _total(chunks: Chunks, a: Tensor | None, like: Tensor) -> Tensor | None:
    """The product of each segment's transitions."""
    if a is None:
        return None
    if Transition.of(a, like) != Transition.MATRIX:
        return a.new_zeros(len(like), *a.shape[1:]).index_add(0, chunks.owner, a)
    total = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(len(like), *a.shape[1:]).clone()
    for segment, chunk in chunks.steps:
        total[segment] = a[chunk] @ total[segment]
    return total


def _transition_grad(a: Tensor, initial: Tensor, d_final: Tensor) -> Tensor:
    """∂L/∂A = G Xᵀ, reduced to the class of A (through the exponential where A is a logarithm)."""
    kind = Transition.of(a, initial)
    if kind == Transition.MATRIX:
        return d_final @ initial.mT
    grad = apply(a, initial) * d_final
    return grad.sum(-1 if kind == Transition.DIAGONAL else (-2, -1))


def _zero(x: LinearInputs) -> Tensor:
    """The zero state of every segment."""
    return x.v.new_zeros(x.state_shape, dtype=x.state_dtype)


def _sum_over_chunks(chunks: Chunks, per_chunk: Tensor, x: LinearInputs) -> Tensor:
    return _zero(x).index_add(0, chunks.owner, per_chunk)
