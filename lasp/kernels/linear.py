"""Linear attention and the delta rule: the public functions. Equations: math §1 and §2."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.inputs import DeltaInputs, LinearInputs, NonCausalInputs
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.recurrence import Alone, Boundary, Op, run
from lasp.kernels.reference.chunk import ChunkedOp, NonCausalOp
from lasp.kernels.segments import Segments
from lasp.kernels.traced import traced

Backend = Literal["auto", "reference", "triton"]
BACKENDS = get_args(Backend)


def like_results(v: Tensor, key_dim: int, states: int | torch.SymInt | None) -> list[Tensor]:
    """Empty tensors like o and, if there are any, so many final states."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if states is None:
        return [o]
    return [o, v.new_empty(states, v.shape[2], key_dim, v.shape[3], dtype=accumulation_dtype(v))]


def like_own_results(
    k: Tensor, v: Tensor, output_final_state: bool, cu_seqlens: Tensor | None, **others: object
) -> list[Tensor]:
    """Likewise, of an operation with these arguments."""
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return like_results(v, k.shape[-1], count if output_final_state else None)


@traced(like_own_results, casts=autocast.unify)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ,  o_t = scale · q_tᵀ S_t.

    Args:
        q, k: [B, T, Hq, K]; value head h uses q/k head h // (H // Hq).
        v: [B, T, H, V], H a multiple of Hq. q, k, v share one dtype: float64, float32, bfloat16 or float16.
        decay: g, natural log, at most 0: None | [H] (constant; must not require grad) | [B, T, H] | [B, T, H, K].
        scale: K ** -0.5 if None.
        causal: False lets every token read the state of its whole sequence (document); decay must then be None.
        initial_state: [N, H, K, V] in fp32 (fp64 for fp64 inputs), N = B or the number of packed documents.
        cu_seqlens: [N + 1] offsets of packed documents, from 0 to T; B must be 1. Triton never copies those on a GPU to
            the host, so their values are not looked at there, as the decay's are not.
        backend: "auto" (Triton on a GPU, the reference elsewhere), "reference" or "triton". A single token (T = 1) of
            which nobody wants a gradient is one launch in Triton.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] (None unless asked for). Everything is
        differentiable once, the two states included; accumulation is in the state's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a decay above 0 (CPU), cu_seqlens that do not end at T,
            or inputs that backend="triton" does not support.
    """
    x = linear_inputs(q, k, v, decay, scale, causal)
    return _run(x, initial_state, output_final_state, cu_seqlens, backend)


@traced(like_own_results, casts=autocast.unify)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = (I - β_t k_t k_tᵀ) Diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ,  o_t = scale · q_tᵀ S_t.

    DeltaNet without decay (arXiv:2406.06484), Gated DeltaNet with [B, T, H] (arXiv:2412.06464), Kimi Delta Attention
    with [B, T, H, K] (arXiv:2510.26692). Keys should have unit length and beta lie in [0, 2]: the caller sees to that.

    Args:
        beta: [B, T, H], the writing strength. Everything else as in `linear_attention`, which this is without `causal`.

    Raises:
        ValueError: as `linear_attention`.
    """
    x = delta_inputs(q, k, v, beta, decay, scale)
    return _run(x, initial_state, output_final_state, cu_seqlens, backend)


def linear_inputs(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, scale: float | None, causal: bool
) -> LinearInputs:
    """The inputs as the op takes them. Raises ValueError unless the tensors fit together."""
    q, k, v = autocast.unify(q, k, v)
    _check(q, k, v, decay, causal)
    return (LinearInputs if causal else NonCausalInputs)(q, k, v, decay, scale=checks.scale(scale, q.shape[-1]))


def delta_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, scale: float | None
) -> DeltaInputs:
    """The inputs as the op takes them. Raises ValueError unless the tensors fit together."""
    q, k, v = autocast.unify(q, k, v)
    _check(q, k, v, decay, causal=True)
    checks.same_kind({"v": v, "beta": beta})
    checks.shape("beta", beta, v.shape[:3], "[B, T, H]")
    return DeltaInputs(q, k, v, decay, beta=beta, scale=checks.scale(scale, q.shape[-1]))


def choose_op(x: LinearInputs, backend: Backend, wants_summary: bool) -> Op[Any]:
    """The implementation that serves these inputs: for "auto" Triton's on a GPU if it can, else the reference."""
    reference = ChunkedOp() if x.causal else NonCausalOp()
    if not may_be_triton(x, backend):
        return reference
    from lasp.kernels.triton.dispatch import triton_op

    op, refusal = triton_op(x, backend == "triton", wants_summary)
    checks.require(op is not None or backend == "auto", "backend", "'triton'", f"'auto' or 'reference' for {refusal}")
    return op or reference


def run_op(
    x: LinearInputs,
    boundary: Boundary,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The op between whatever boundary: one rank's or an exchange."""
    return run(choose_op(x, backend, boundary.wants_summary), boundary, x, initial_state, output_final_state)


def _check(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, causal: bool) -> None:
    checks.same_kind({"v": v, "q": q, "k": k}, decay=decay)
    checks.heads(q, k, v)
    checks.flag("causal", causal)
    checks.decay(decay, v, k.shape[-1], causal)


def may_be_triton(x: LinearInputs | LogLinearInputs, backend: Backend) -> bool:
    """Whether Triton is wanted, here, for such inputs. Raises ValueError for no backend."""
    checks.choice("backend", backend, BACKENDS)
    wanted = backend == "triton" or (backend == "auto" and x.v.is_cuda)
    return wanted and x.v.shape[0] > 0  # there is nothing to launch for no sequences


def _run(x: LinearInputs, initial_state, output_final_state, cu_seqlens, backend) -> tuple[Tensor, Tensor | None]:
    batch, tokens = x.v.shape[:2]
    checks.cu_seqlens(cu_seqlens, batch, tokens, copy=False)
    if cu_seqlens is not None:
        x = x.having({}, Segments(batch, tokens, cu_seqlens))
    checks.state(initial_state, x.state_shape, x.state_dtype, x.device)
    if tokens == 1 and x.causal and may_be_triton(x, backend):
        from lasp.kernels.triton.dispatch import triton_step

        if step := triton_step(x, initial_state, asked=backend == "triton"):
            return step[0], step[1] if output_final_state else None
    return run_op(x, Alone(), initial_state=initial_state, output_final_state=output_final_state, backend=backend)
