"""The specification, token by token (math §1). Slow, and meant to be read; autograd differentiates it.

S_t = (I - beta_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + beta_t k_t v_tᵀ         delta family
S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ                                      everything else
o_t = scale · q_tᵀ S_t
"""

import torch
from torch import Tensor

from lasp.kernels.decay import Decay
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.segments import Segments


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final states [N, H, K, V]; shapes and meanings as in `lasp.kernels.linear_attention`."""
    (batch, tokens, heads, _), key_dim, dtype = v.shape, k.shape[-1], accumulation_dtype(v)
    segments = Segments(batch, tokens, cu_seqlens)
    q, k, v = by_token(q, k, v, scale)
    g = _per_channel(decay, batch * tokens, heads, key_dim, dtype)
    beta = None if beta is None else beta.flatten(0, 1).to(dtype)

    outputs, finals = [], []
    for n in range(segments.count):
        start, stop = int(segments.offsets[n]), int(segments.offsets[n + 1])
        state = v.new_zeros(heads, key_dim, v.shape[-1]) if initial_state is None else initial_state[n].to(dtype)
        states = []
        for t in range(start, stop):
            if g is not None:
                state = g[t].exp()[:, :, None] * state
            write = v[t] if beta is None else beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + k[t][:, :, None] * write[:, None, :]
            states.append(state)
        if not causal:
            states = [state] * len(states)
        outputs += [torch.einsum("hk,hkv->hv", q[start + i], s) for i, s in enumerate(states)]
        finals.append(state)
    return torch.stack(outputs).unflatten(0, (batch, tokens)), torch.stack(finals)


def by_token(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three as [B·T, H, K or V] in the dtype of the state: q times the scale, a q and a k for each value head."""
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    q, k, v = (x.flatten(0, 1).to(accumulation_dtype(v)) for x in (q, k, v))
    return q, k, v


def _per_channel(decay: Tensor | None, tokens: int, heads: int, key_dim: int, dtype: torch.dtype) -> Tensor | None:
    """The log decay as [B·T, H, K], whatever form it came in."""
    if decay is None:
        return None
    kind, decay = Decay.of(decay), decay.to(dtype)
    if kind == Decay.DIAGONAL:
        return decay.flatten(0, 1)
    decay = decay if kind == Decay.CONSTANT else decay.flatten(0, 1)
    return decay[..., None].expand(tokens, heads, key_dim)
