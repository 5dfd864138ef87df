"""What one call of delta_product is given, and its definition token by token."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize

F64 = torch.float64
Q_HEADS, HEADS, K, V = 1, 2, 6, 4


@dataclass(frozen=True)
class Case:
    """per_token: q, k, v, beta and perhaps decay; state: at first; do, d_final: of the results."""

    per_token: dict[str, Tensor]
    state: Tensor
    offsets: Tensor | None
    do: Tensor
    d_final: Tensor


def draw(gen: torch.Generator, kind: str, steps: int, tokens: int, documents=None, batch: int = 1) -> Case:
    """kind: of the decay. Keys and betas leave something of the past, as in tests.parallel.inputs."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=F64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=F64)

    rows, each = (batch, tokens, HEADS), (batch, tokens, steps)
    basis = torch.linalg.qr(normal(K, K - 2)).Q
    tensors = {
        "q": normal(batch, tokens, Q_HEADS, K - 2) @ basis.T + 0.1 * normal(batch, tokens, Q_HEADS, K),
        "k": normalize(normal(*each, Q_HEADS, K - 2) @ basis.T, dim=-1),
        "v": normal(*each, HEADS, V),
        "beta": 0.2 * uniform(*each, HEADS) / steps,
    }
    if kind != "none":
        tensors["decay"] = -uniform(*(rows if kind == "scalar" else (*rows, K))) * 3 / tokens
    count = batch if documents is None else len(documents) - 1
    offsets = None if documents is None else torch.tensor(documents)
    return Case(tensors, normal(count, HEADS, K, V), offsets, normal(*rows, V), normal(count, HEADS, K, V))


def define(q, k, v, beta, decay, state, offsets) -> tuple[Tensor, Tensor]:
    """o and the final states: exp(g_t), then the steps in their order, then the query."""
    (batch, tokens, steps), group = v.shape[:3], v.shape[3] // q.shape[2]
    q, k = q.repeat_interleave(group, dim=2) * q.shape[-1] ** -0.5, k.repeat_interleave(group, dim=3)
    edges = [] if offsets is None else offsets.tolist()
    runs = [(0, a, b) for a, b in pairwise(edges)] or [(row, 0, tokens) for row in range(batch)]
    outputs, finals = [], []
    for n, (row, start, stop) in enumerate(runs):
        s = state[n]
        for t in range(start, stop):
            if decay is not None:
                s = decay[row, t].exp().reshape(v.shape[3], -1, 1) * s
            for j in range(steps):
                householder = torch.eye(k.shape[-1], dtype=F64) - beta[row, t, j, :, None, None] * (
                    k[row, t, j, :, :, None] * k[row, t, j, :, None, :]
                )
                write = beta[row, t, j, :, None, None] * k[row, t, j, :, :, None] * v[row, t, j, :, None, :]
                s = householder @ s + write
            outputs.append((q[row, t, :, None, :] @ s)[:, 0])
        finals.append(s)
    return torch.stack(outputs).unflatten(0, (batch, tokens)), torch.stack(finals)


def expected(case: Case) -> dict[str, Tensor]:
    """Outputs, final states and every gradient."""
    leaves = {name: x.clone().requires_grad_() for name, x in (case.per_token | {"state": case.state}).items()}
    o, final = define(**{"decay": None} | leaves, offsets=case.offsets)
    grads = torch.autograd.grad([o, final], list(leaves.values()), [case.do, case.d_final])
    of = {f"d{name}": d for name, d in zip(leaves, grads, strict=True)}
    return {"o": o.detach(), "final": final.detach()} | of
