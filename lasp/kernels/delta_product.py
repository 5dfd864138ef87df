"""Several steps of the delta rule for each token (DeltaProduct, arXiv:2502.10297), by the delta rule's own kernels.

T tokens of n steps are T·n tokens of the delta rule, of which a token's first one decays and its last one reads. States
are the same, so that boundaries and exchanges know nothing of it; what is kept for backward is not stretched.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels import autocast, checks
from lasp.kernels.inputs import DeltaInputs, DeltaProductInputs
from lasp.kernels.linear import Backend, choose_op, delta_inputs, like_own_results, may_be_triton
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Alone, Boundary, Finished, Gradients, Kept, Op, run
from lasp.kernels.segments import Segments
from lasp.kernels.traced import traced


def _like_results(**given: Any) -> list[Tensor]:
    return like_own_results(**given | {"v": given["v"].select(2, 0)})


@traced(_like_results, casts=autocast.unify)
def delta_product(
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
    """`delta_rule` with n steps a token, S_t,0 = Diag(exp g_t) S_{t-1} and S_t = S_t,n:

        S_t,j = (I - β_tj k_tj k_tjᵀ) S_t,j-1 + β_tj k_tj v_tjᵀ,   o_t = scale · q_tᵀ S_t.

    Gated DeltaProduct with a decay [B, T, H], DeltaProduct without (arXiv:2502.10297): a token's transition is a
    product of n generalised Householder matrices. It takes the time of n delta rules.

    Args:
        q: [B, T, Hq, K].
        k: [B, T, n, Hq, K], in the order of the steps, as what follows; n at least 1.
        v: [B, T, n, H, V], H a multiple of Hq.
        beta: [B, T, n, H]. Everything else as in `delta_rule`, which this is for n = 1.

    Returns:
        o [B, T, H, V] and the final state, as `delta_rule`.

    Raises:
        ValueError: as `linear_attention`.
    """
    x = delta_product_inputs(q, k, v, beta, decay, scale)
    batch, tokens = q.shape[:2]
    checks.cu_seqlens(cu_seqlens, batch, tokens, copy=False)
    if cu_seqlens is not None:
        x = x.having({}, Segments(batch, tokens, cu_seqlens))
    checks.state(initial_state, x.state_shape, x.state_dtype, x.device)
    if tokens == 1 and may_be_triton(x.step(0), backend) and (token := _one_token(x, initial_state, backend)):
        return token[0], token[1] if output_final_state else None
    return run_product(x, Alone(), initial_state=initial_state, output_final_state=output_final_state, backend=backend)


def delta_product_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, scale: float | None
) -> DeltaProductInputs:
    """The inputs as the op takes them. Raises ValueError unless the tensors fit together."""
    q, k, v = autocast.unify(q, k, v)
    for name, x, dims in (("k", k, "[B, T, n, Hq, K]"), ("v", v, "[B, T, n, H, V]"), ("beta", beta, "[B, T, n, H]")):
        checks.tensor(name, x)
        checks.require(x.ndim == dims.count(",") + 1, name, f"{x.ndim} dimensions", dims)
        fits = x.shape[2] == k.shape[2] >= 1
        checks.require(fits, name, f"{x.shape[2]} steps a token", "as many as k has, and at least one")
    first = delta_inputs(q, k.select(2, 0), v.select(2, 0), beta.select(2, 0), decay, scale)
    if decay is not None and decay.ndim == 1:
        decay = decay.expand(*v.shape[:2], -1)
    return DeltaProductInputs(q, k, v, decay, beta, scale=first.scale)


def run_product(
    x: DeltaProductInputs,
    boundary: Boundary,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The op between whatever boundary: one rank's or an exchange."""
    op = DeltaProductOp(choose_op(x.step(0), backend, boundary.wants_summary))
    return run(op, boundary, x, initial_state, output_final_state)


class DeltaProductOp:
    """An op of the delta rule, of n times as many tokens."""

    def __init__(self, delta_rule: Op[DeltaInputs]):
        self.delta_rule = delta_rule

    def summarize(self, x: DeltaProductInputs, wanted: bool):
        steps = x.steps()
        summary, partial = self.delta_rule.summarize(steps, wanted)
        return summary, (steps, partial)

    def finish(self, x: DeltaProductInputs, partial, incoming: Pending[Tensor | None]) -> Finished:
        steps, partial = partial
        o, outgoing, kept = self.delta_rule.finish(steps, partial, incoming)
        return _of_tokens(o, x)[:, :, -1].contiguous(), outgoing, kept

    def summarize_grad(self, x: DeltaProductInputs, kept: Kept, do: Tensor, wanted: bool):
        steps, do = x.steps(), pad(do[:, :, None], (0, 0, 0, 0, x.count - 1, 0)).flatten(1, 2)
        total, partial = self.delta_rule.summarize_grad(steps, kept, do, wanted)
        return total, (steps, partial)

    def finish_grad(self, x: DeltaProductInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        steps, partial = partial
        found, incoming = self.delta_rule.finish_grad(steps, kept, partial, d_outgoing)
        of = {name: _of_tokens(d, x) for name, d in found.items() if d is not None}
        places = {"q": -1, "decay": 0}  # of the steps that know them
        return Gradients(
            {name: d.select(2, places[name]).contiguous() if name in places else d for name, d in of.items()}, incoming
        )


def _of_tokens(x: Tensor, like: DeltaProductInputs) -> Tensor:
    """[B, T n, ...] -> [B, T, n, ...]."""
    return x.unflatten(1, (-1, like.count))


def _one_token(x: DeltaProductInputs, state: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor | None] | None:
    """o and the new states, in n launches; None where Triton has none for such a token."""
    from lasp.kernels.triton.dispatch import triton_step

    o = x.q
    for j in range(x.count):
        if (step := triton_step(x.step(j), state, asked=backend == "triton")) is None:
            return None
        o, state = step
    return o, state
