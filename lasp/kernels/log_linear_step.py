"""Log-linear attention one token at a time, and in whatever pieces tokens come, for generation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.fenwick import FenwickState, entered, fitted, occupied
from lasp.kernels.log_linear import (
    check_levels,
    check_state,
    log_linear_attention,
    log_linear_delta_inputs,
    log_linear_delta_rule,
    log_linear_inputs,
)
from lasp.kernels.summary import SHUT


class FenwickMemory:
    """The slots of N sequences, which `step` changes in place; no gradient.

    A slot is written when tokens enter it, which one does at a time: a token costs one write of a state and as many
    reads as there are slots, one for each bit of its position that is set. What slots have decayed since they were
    written is kept apart, in `since`. (A delta rule erases something from all of them, and so writes them.)

    slots: [N, J, H, K, V]; those that hold no token now are not zero. since: [N, J, H], log decays. tokens: [N] int64
    on the host.
    """

    def __init__(self, state: FenwickState):
        self.slots = fitted(state.slots.detach(), state.tokens, state.slots.shape[1])  # a copy
        self.since = self.slots.new_zeros(self.slots.shape[:3])
        self.tokens = state.tokens.clone()

    @property
    def state(self) -> FenwickState:
        """To go on from with many tokens."""
        slots = self.slots * self.since.exp()[..., None, None]
        return FenwickState(fitted(slots, self.tokens, slots.shape[1]), self.tokens.clone())

    def select(self, rows: Tensor) -> "FenwickMemory":
        """That of some rows, which may be repeated."""
        return FenwickMemory(self.state.select(rows))

    @torch.no_grad()
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, level_scales: Tensor, beta: Tensor | None = None,
        *, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """o [N, 1, H, V] of one token of every sequence; the arguments are those of `log_linear_attention` and
        `log_linear_delta_rule` with T = 1, N rows, and either decay or beta.

        Raises:
            ValueError: as those do.
        """
        if beta is not None:
            x = log_linear_delta_inputs(q, k, v, beta, decay, level_scales, scale)
        else:
            x = log_linear_inputs(q, k, v, decay, level_scales, scale)
        q, k, v, scale = x.q, x.k, x.v, x.scale
        checks.require(v.shape[1] == 1, "v", f"{v.shape[1]} tokens", "1 of every sequence")
        check_state(FenwickState(self.slots, self.tokens), v.shape[0], x)
        check_levels(level_scales.shape[-1], self.tokens + 1)
        self._make_room(max(self.tokens.tolist(), default=0) + 1)
        if v.is_cuda:
            from lasp.kernels.triton.device import unsupported
            from lasp.kernels.triton.log_linear.step import step

            if unsupported(k, v) is None:
                o, self.since = step(q, k, v, decay, level_scales, beta, self.slots, self.since, self.tokens, scale)
                self.tokens = self.tokens + 1
                return o
        return self._step(q, k, v, decay, level_scales, beta, scale)

    def _make_room(self, tokens: int) -> None:
        missing = tokens.bit_length() - self.slots.shape[1]
        if missing > 0:
            self.slots, self.since = (
                torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) for x in (self.slots, self.since)
            )

    def _step(self, q, k, v, decay, level_scales, beta, scale: float) -> Tensor:
        dtype, device, (rows, slots, heads) = self.slots.dtype, self.slots.device, self.since.shape
        q, k = (x[:, 0].to(dtype).repeat_interleave(heads // x.shape[2], dim=1) for x in (q, k))
        scales = level_scales[:, 0].to(dtype)
        own = torch.einsum("nhk,nhv->nhkv", k, v[:, 0].to(dtype))
        if beta is not None:
            strength = beta[:, 0].to(dtype)[..., None, None]
            own = own * strength
            self.slots -= strength[:, None] * torch.einsum("nhk,nhl,njhlv->njhkv", k, k, self.slots)
        if decay is not None:
            self.since = self.since + decay[:, 0].to(dtype).clamp(min=SHUT[dtype])[:, None]
        left = self.since.exp() * occupied(self.tokens, slots).to(device)[..., None]
        read = torch.einsum("njh,njhkv->nhkv", left * _padded(scales, slots + 1)[..., 1:].mT, self.slots)
        o = scale * torch.einsum("nhk,nhkv->nhv", q, read + scales[..., 0, None, None] * own)

        into = entered(self.tokens)
        merges = (torch.arange(slots, device="cpu") < into[:, None]).to(device)
        merged = torch.einsum("njh,njhkv->nhkv", left * merges[..., None], self.slots) + own
        row, into = torch.arange(rows, device=device), into.to(device)
        self.slots[row, into], self.since[row, into] = merged, 0.0
        self.tokens = self.tokens + 1
        return o[:, None].to(v.dtype)


def go_on(
    past: FenwickState | FenwickMemory | None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    **tensors: Any,
) -> tuple[Tensor, FenwickState | FenwickMemory]:
    """o [B, T, H, V] and the past for the next call: log-linear attention, or the delta rule if there is a beta.

    tensors: theirs, by name.
    One token of every row of which nobody wants a gradient changes the past in place.
    """
    if past is not None and tensors["v"].shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        memory = past if isinstance(past, FenwickMemory) else FenwickMemory(past)
        return memory.step(**tensors, scale=scale), memory
    state = past.state if isinstance(past, FenwickMemory) else past
    attend: Callable[..., Any] = log_linear_delta_rule if "beta" in tensors else log_linear_attention
    return attend(**tensors, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)


def _padded(scales: Tensor, levels: int) -> Tensor:
    """[N, H, levels]: those of levels that no slot has are 0."""
    missing = levels - scales.shape[-1]
    return torch.nn.functional.pad(scales, (0, missing)) if missing > 0 else scales[..., :levels]
