"""Random inputs that show what sequence parallelism does: with careless ones the far past vanishes, unseen.

Keys lie in a proper subspace, beta is small and the decay over the sequence is a few units (math §2, "Test trap").
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp.kernels.inputs import DeltaInputs, LinearInputs
from lasp.kernels.reference.recurrent import recurrent
from lasp.kernels.segments import Segments
from lasp.parallel import Sequence

F64 = torch.float64
KINDS = ("none", "constant", "scalar", "diagonal", "not causal", "delta", "gated delta", "diagonal delta")
Q_HEADS, HEADS, K, V = 1, 2, 6, 4


@dataclass(frozen=True)
class Case:
    """What one call of linear_attention or delta_rule is given, and the gradients of what it returns."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    do: Tensor
    d_final: Tensor

    @property
    def per_token(self) -> dict[str, Tensor]:
        """The tensors that are split over ranks."""
        named = {"q": self.q, "k": self.k, "v": self.v, "beta": self.beta}
        if self.decay is not None and self.decay.ndim > 1:
            named["decay"] = self.decay
        return {name: x for name, x in named.items() if x is not None}

    def call(self, linear_attention, delta_rule, tensors: dict[str, Tensor], **options):
        """Calls whichever of the two functions this case is for, with `tensors` in the place of its own."""
        decay = tensors.get("decay", self.decay)
        if self.beta is not None:
            return delta_rule(tensors["q"], tensors["k"], tensors["v"], tensors["beta"], decay, **options)
        options["causal"] = self.kind != "not causal"
        return linear_attention(tensors["q"], tensors["k"], tensors["v"], decay, **options)


def inputs_of(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None, scale: float, segments: Segments
) -> LinearInputs:
    """As the ops take them: with beta those of the delta rule."""
    if beta is None:
        return LinearInputs(q, k, v, decay, scale=scale, segments=segments)
    return DeltaInputs(q, k, v, decay, beta=beta, scale=scale, segments=segments)


def generator(seed: int) -> torch.Generator:
    """On the device that tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw(
    gen: torch.Generator,
    kind: str,
    tokens: int,
    documents: tuple[int, ...] | None = None,
    batch: int = 1,
    state: bool = True,
) -> Case:
    """A case of `tokens` tokens; `documents` are offsets within them."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=F64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=F64)

    basis = torch.linalg.qr(normal(K, K - 2)).Q
    keys = torch.nn.functional.normalize(normal(batch, tokens, Q_HEADS, K - 2) @ basis.T, dim=-1)
    queries = normal(batch, tokens, Q_HEADS, K - 2) @ basis.T + 0.1 * normal(batch, tokens, Q_HEADS, K)
    rows = batch, tokens, HEADS
    shape = {
        "constant": (HEADS,),
        "scalar": rows,
        "gated delta": rows,
        "diagonal": (*rows, K),
        "diagonal delta": (*rows, K),
    }
    decay = -uniform(*shape[kind]) * 3 / tokens if kind in shape else None
    count = batch if documents is None else len(documents) - 1
    return Case(
        kind=kind,
        q=queries,
        k=keys,
        v=normal(*rows, V),
        decay=decay,
        beta=0.2 * uniform(*rows) if "delta" in kind else None,
        initial_state=normal(count, HEADS, K, V) if state else None,
        cu_seqlens=None if documents is None else torch.tensor(documents),
        do=normal(*rows, V),
        d_final=normal(count, HEADS, K, V),
    )


def expected(case: Case) -> dict[str, Tensor]:
    """Outputs, final state and every gradient by the token-by-token definition."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.per_token.items()}
    if case.initial_state is not None:
        leaves["initial_state"] = case.initial_state.clone().requires_grad_()
    o, final_state = _recurrent(case, leaves)
    grads = torch.autograd.grad([o, final_state], list(leaves.values()), [case.do, case.d_final])
    return {"o": o.detach(), "final_state": final_state.detach()} | {
        f"d{name}": g for name, g in zip(leaves, grads, strict=True)
    }


def share_of_the_past(case: Case, units: int, distance: int) -> float:
    """The part of the last unit's output (its norm) that stems from tokens at least `distance` whole units back."""
    length = -(-case.v.shape[1] // units)
    last = (case.v.shape[1] - 1) // length
    past = torch.arange(case.v.shape[1]) < (last - distance + 1) * length
    far = replace(case, v=case.v * past[:, None, None], initial_state=None)
    whole = _recurrent(case, case.per_token)[0][:, last * length :]
    return float(_recurrent(far, far.per_token)[0][:, last * length :].norm() / whole.norm())


def _recurrent(case: Case, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return recurrent(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        tensors.get("decay", case.decay),
        tensors.get("beta"),
        causal=case.kind != "not causal",
        initial_state=tensors.get("initial_state", case.initial_state),
        cu_seqlens=case.cu_seqlens,
    )


def unsharded(sequence: Sequence, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole of tensors [B, T, ...] of one dtype, in one message."""
    rows = torch.cat([x.flatten(2) for x in local.values()], dim=2)
    parts = sequence.unshard(rows).split([x.shape[2:].numel() for x in local.values()], dim=2)
    return {name: part.unflatten(2, x.shape[2:]) for (name, x), part in zip(local.items(), parts, strict=True)}


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error by norms; infinite if anything is not finite or the shapes differ."""
    if got.shape != wanted.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-3)).item()
