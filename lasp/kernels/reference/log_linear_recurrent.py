"""Log-linear attention token by token (math §4). Slow, and meant to be read; autograd differentiates it.

Each level l has a state of its own, of the tokens that the present one sees at that level. All of them decay (and are
erased) alike; behind a token, those of the levels below the lowest zero bit of its position become one:

    S_t^(l) = A_t S_{t-1}^(l)        S_t^(0) = beta_t k_t v_tᵀ        o_t = scale · Σ_l λ_t^(l) q_tᵀ S_t^(l)
    A_t = (I - beta_t k_t k_tᵀ) exp(g_t), without beta exp(g_t) and S_t^(0) = k_t v_tᵀ
"""

import torch
from torch import Tensor

from lasp.kernels.fenwick import FenwickState
from lasp.kernels.reference.recurrent import by_token
from lasp.kernels.segments import Segments


def log_linear_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    level_scales: Tensor,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: FenwickState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, FenwickState]:
    """o [B, T, H, V] and the final states; shapes and meanings as in `lasp.kernels.log_linear_attention`."""
    batch, tokens, heads, _ = v.shape
    segments = Segments(batch, tokens, cu_seqlens)
    q, k, v = by_token(q, k, v, scale)
    scales = level_scales.flatten(0, 1).to(v.dtype)
    g, beta = (None if x is None else x.flatten(0, 1).to(v.dtype) for x in (decay, beta))

    outputs, finals, counts = [], [], []
    for n in range(segments.count):
        seen = 0 if initial_state is None else int(initial_state.tokens[n])
        slots: dict[int, Tensor] = {}
        if initial_state is not None:
            slots = {j: initial_state.slots[n, j] for j in range(seen.bit_length()) if seen >> j & 1}
        for t in range(int(segments.offsets[n]), int(segments.offsets[n + 1])):
            for j, state in slots.items():
                if g is not None:
                    state = g[t].exp()[:, None, None] * state
                if beta is not None:
                    erased = beta[t][:, None] * torch.einsum("hk,hkv->hv", k[t], state)
                    state = state - k[t][:, :, None] * erased[:, None, :]
                slots[j] = state
            own = k[t][:, :, None] * (v[t] if beta is None else beta[t][:, None] * v[t])[:, None, :]
            read = scales[t, :, 0, None, None] * own
            for j, state in slots.items():
                read = read + scales[t, :, j + 1, None, None] * state
            outputs.append(torch.einsum("hk,hkv->hv", q[t], read))
            ones = (~seen & (seen + 1)).bit_length() - 1  # at the end of the position
            slots[ones] = sum((slots.pop(j) for j in range(ones)), own)
            seen += 1
        finals.append(slots)
        counts.append(seen)
    empty = v.new_zeros(heads, k.shape[-1], v.shape[-1])
    most = max(counts).bit_length()
    final = v.new_zeros(segments.count, 0, *empty.shape)
    if most:
        final = torch.stack([torch.stack([slots.get(j, empty) for j in range(most)]) for slots in finals])
    return torch.stack(outputs).unflatten(0, (batch, tokens)), FenwickState(final, torch.tensor(counts, device="cpu"))
