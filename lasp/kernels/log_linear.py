"""Log-linear attention: the public functions. Equations: math §4."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels import autocast, checks
from lasp.kernels.fenwick import FenwickState, resized
from lasp.kernels.linear import BACKENDS, Backend, like_own_results, may_be_triton
from lasp.kernels.log_linear_inputs import LogLinearDeltaInputs, LogLinearInputs
from lasp.kernels.recurrence import Alone, Boundary, Op, run
from lasp.kernels.reference.log_linear import LogLinearOp
from lasp.kernels.segments import Segments
from lasp.kernels.traced import traced


def with_slots(results: list[Tensor]) -> list[Tensor]:
    """From empty tensors like o and some states those like o, their slots and tokens.

    How many slots there are follows from the numbers of tokens, which are not looked at.
    """
    o, *states = results
    if not states:
        return [o]
    count, *shape = states[0].shape
    slots = states[0].new_empty(count, torch.library.get_ctx().new_dynamic_size(), *shape)
    return [o, slots, torch.empty(count, dtype=torch.long, device="cpu")]


def _like_results(**given: Any) -> list[Tensor]:
    return with_slots(like_own_results(**given))


@traced(_like_results, casts=autocast.unify)
def log_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    level_scales: Tensor,
    *,
    scale: float | None = None,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, FenwickState | None]:
    """o_t = scale · Σ_{s<=t} λ_t^(l(t, s)) exp(g_{s+1} + … + g_t) (q_t·k_s) v_s with l(t, s) = bit_length(t xor s).

    Linear attention with a scalar gate that tells its past apart by age (arXiv:2506.04761): the level l is 0 for the
    token itself, and l for the 2^(l-1) tokens before the last place where bit l - 1 of its position was 0. So a state
    is kept for each bit of a position that is set, log2(T) at most.

    Args:
        q, k: [B, T, Hq, K]; value head h uses q/k head h // (H // Hq).
        v: [B, T, H, V], H a multiple of Hq. q, k, v share one dtype: float64, float32, bfloat16 or float16.
        decay: g [B, T, H], natural log, at most 0.
        level_scales: λ [B, T, H, L], L > bit_length(t) for the position t of every token, counted from the start of its
            document and including those that the initial state has seen: L >= log2(T) + 1.
        scale: K ** -0.5 if None.
        initial_state: of N = B sequences or packed documents; tokens go on at position `initial_state.tokens`.
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1. Levels restart in every document.
            Offsets on a GPU are copied to the host.
        backend: "auto" (Triton on a GPU, the reference elsewhere), "reference" or "triton".

    Returns:
        o [B, T, H, V] in v's dtype, and the final state (None unless asked for). Everything is differentiable once,
        the slots of the two states included; accumulation is in the state's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a decay above 0 (CPU), too few levels, an initial state
            whose slots do not hold its tokens, or inputs that backend="triton" does not support.
    """
    x = log_linear_inputs(q, k, v, decay, level_scales, scale)
    return _run(x, initial_state, output_final_state, cu_seqlens, backend)


@traced(_like_results, casts=autocast.unify)
def log_linear_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    level_scales: Tensor,
    *,
    scale: float | None = None,
    initial_state: FenwickState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, FenwickState | None]:
    """The same for the (gated) delta rule: o_t = scale · Σ_{s<=t} λ_t^(l(t, s)) q_tᵀ A_t … A_{s+1} β_s k_s v_sᵀ with
    A_t = (I - β_t k_t k_tᵀ) exp(g_t).

    Args:
        beta: [B, T, H], the writing strength; keys should have unit length and beta lie in [0, 2].
        decay: None or [B, T, H]. Everything else as in `log_linear_attention`.

    Raises:
        ValueError: as `log_linear_attention`.
    """
    x = log_linear_delta_inputs(q, k, v, beta, decay, level_scales, scale)
    return _run(x, initial_state, output_final_state, cu_seqlens, backend)


def _run(x: LogLinearInputs, initial_state, output_final_state, cu_seqlens, backend):
    checks.choice("backend", backend, BACKENDS)
    batch, tokens = x.v.shape[:2]
    checks.cu_seqlens(cu_seqlens, batch, tokens)
    segments = Segments(batch, tokens, None if cu_seqlens is None else cu_seqlens.cpu())
    check_state(initial_state, segments.count, x)
    x = x.cut({}, segments, seen_by(initial_state, segments.count))
    check_levels(x.level_scales.shape[-1], x.tokens_after)
    slots = None if initial_state is None else resized(initial_state.slots, x.state_shape[1])
    o, final = run_op(x, backend, Alone(), slots, output_final_state)
    return o, None if final is None else FenwickState(final, x.tokens_after)


def run_op(
    x: LogLinearInputs,
    backend: Backend,
    boundary: Boundary,
    slots: Tensor | None,
    output_final_state: bool,
    around: Callable[[Op[Any]], Op[Any]] = lambda op: op,
) -> tuple[Tensor, Tensor | None]:
    """o and, if asked for, the final slots. For Triton, heads get columns of zeros that none of these has.

    around: an op in the place of the chosen one.
    """
    given = x
    if may_be_triton(x, backend):
        from lasp.kernels.triton.dispatch import in_blocks

        x = in_blocks(x)
        if slots is not None:
            slots = pad(slots, (0, x.v.shape[-1] - slots.shape[-1], 0, x.k.shape[-1] - slots.shape[-2]))
    o, final = run(around(choose_op(x, backend, boundary.wants_summary)), boundary, x, slots, output_final_state)
    if x is not given:
        key_dim, value_dim = given.k.shape[-1], given.v.shape[-1]
        o, final = o[..., :value_dim].contiguous(), None if final is None else final[..., :key_dim, :value_dim]
    return o, final


def seen_by(state: FenwickState | None, count: int) -> tuple[int, ...]:
    """How many tokens each of the sequences or documents has had."""
    return (0,) * count if state is None else tuple(state.tokens.tolist())


def log_linear_inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, level_scales: Tensor, scale: float | None
) -> LogLinearInputs:
    """The inputs as the op takes them. Raises ValueError unless the tensors fit together."""
    checks.tensor("decay", decay)
    return _inputs(q, k, v, decay, level_scales, None, scale)


def log_linear_delta_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, level_scales: Tensor, scale: float | None
) -> LogLinearInputs:
    """The inputs as the op takes them. Raises ValueError unless the tensors fit together."""
    checks.tensor("beta", beta)
    return _inputs(q, k, v, decay, level_scales, beta, scale)


def _inputs(q, k, v, decay, level_scales, beta, scale) -> LogLinearInputs:
    q, k, v = autocast.unify(q, k, v)
    checks.same_kind({"v": v, "q": q, "k": k, "level_scales": level_scales}, decay=decay, beta=beta)
    checks.heads(q, k, v)
    rows = tuple(v.shape[:3])
    if decay is not None:
        checks.shape("decay", decay, rows, "[B, T, H]")
    checks.decay(decay, v, k.shape[-1], causal=True)
    if beta is not None:
        checks.shape("beta", beta, rows, "[B, T, H]")
    checks.require(level_scales.ndim == 4, "level_scales", f"shape {list(level_scales.shape)}", "[B, T, H, L]")
    checks.shape("level_scales", level_scales, (*rows, level_scales.shape[-1]), "[B, T, H, L]")
    scale = checks.scale(scale, k.shape[-1])
    if beta is None:
        return LogLinearInputs(q, k, v, decay, level_scales, scale=scale)
    return LogLinearDeltaInputs(q, k, v, decay, level_scales, beta=beta, scale=scale)


def check_levels(levels: int, tokens: Tensor) -> None:
    """tokens: [N] how many every document has, those seen before included."""
    longest = int(tokens.max()) if tokens.numel() else 0
    most = max(longest - 1, 0).bit_length() + 1
    expected = f"at least {most} for {longest} tokens (log2, rounded up, + 1); {levels} levels address"
    addressed = 1 << (levels - 1) if levels else 0
    checks.require(levels >= most, "level_scales", f"{levels} levels", f"{expected} {addressed}")


def check_state(state: FenwickState | None, count: int, x: LogLinearInputs) -> None:
    """Raises ValueError unless it is a state of so many sequences or documents for these inputs."""
    if state is None:
        return
    checks.require(isinstance(state, FenwickState), "initial_state", f"a {type(state).__name__}", "a FenwickState")
    slots, tokens = state
    checks.tensor("initial_state.slots", slots)
    checks.tensor("initial_state.tokens", tokens)
    checks.shape("initial_state.tokens", tokens, (count,), "[N]")
    fits = tokens.dtype == torch.long and tokens.device.type == "cpu"
    checks.require(fits, "initial_state.tokens", f"{tokens.dtype} on {tokens.device}", "int64 on the CPU")
    seen = tokens.tolist()
    least, most = min(seen, default=0), max(seen, default=0)
    checks.require(least >= 0, "initial_state.tokens", least, "at least 0")
    checks.require(slots.ndim == 5, "initial_state.slots", f"shape {list(slots.shape)}", "[N, J, H, K, V]")
    expected = (count, slots.shape[1], *x.state_shape[2:])
    checks.shape("initial_state.slots", slots, expected, "[N, J, H, K, V]")
    needed = most.bit_length()
    got = f"{slots.shape[1]} slots"
    checks.require(slots.shape[1] >= needed, "initial_state.slots", got, f"{needed} for {most} tokens seen")
    expected_dtype, device = f"{x.state_dtype} for {x.v.dtype} inputs", x.v.device
    checks.require(slots.dtype == x.state_dtype, "initial_state.slots", f"dtype {slots.dtype}", expected_dtype)
    checks.require(slots.device == device, "initial_state.slots", f"device {slots.device}", f"{device}, as v")


def choose_op(x: LogLinearInputs, backend: Backend, wants_summary: bool) -> Op[Any]:
    """The implementation that serves these inputs: for "auto" Triton's on a GPU if it can, else the reference."""
    if not may_be_triton(x, backend):
        return LogLinearOp()
    from lasp.kernels.triton.dispatch import triton_log_linear_op

    op, refusal = triton_log_linear_op(x, backend == "triton", wants_summary)
    checks.require(op is not None or backend == "auto", "backend", "'triton'", f"'auto' or 'reference' for {refusal}")
    return op or LogLinearOp()
