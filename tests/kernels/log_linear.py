"""Log-linear attention for tests: the dense definition, and inputs that show all of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.fenwick import FenwickState, level
from lasp.kernels.log_linear_inputs import LogLinearDeltaInputs, LogLinearInputs
from lasp.kernels.segments import Segments

F64 = torch.float64


def dense(q, k, v, decay, level_scales, beta=None, *, scale=None, cu_seqlens=None) -> tuple[Tensor, None]:
    """o [B, T, H, V] from the T² coefficients of all pairs (math §4): no state, no order but that of the tokens.

    Coefficient (t, s) is q_tᵀ A_t … A_{s+1} B_s: the rows q_t of all t are carried back from the last token to the
    first, one transition A_s at a time.
    """
    if cu_seqlens is not None:
        parts = [slice(a, b) for a, b in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False) if a < b]
        per_part = [[None if x is None else x[:, rows] for x in (q, k, v, decay, level_scales, beta)] for rows in parts]
        return torch.cat([dense(*part, scale=scale)[0] for part in per_part], 1), None
    tokens, heads = v.shape[1:3]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in (q * scale, k))
    v, scales = v.transpose(1, 2), level_scales.transpose(1, 2)
    rows, columns = q[:, :, :0], []
    for s in reversed(range(tokens)):
        rows = torch.cat([q[:, :, s : s + 1], rows], 2)
        key = k[:, :, s, :, None]
        column = rows @ key
        if beta is not None:
            column = column * beta[:, s, :, None, None]
            rows = rows - column * key.mT
        if decay is not None:
            rows = rows * decay[:, s, :, None, None].exp()
        columns.append(torch.cat([column.new_zeros(*column.shape[:2], s, 1), column], 2))
    coefficients = torch.cat(columns[::-1], 3)
    place = torch.arange(tokens)
    levels = level(place[:, None], place[None, :]).tril().expand(*v.shape[:2], -1, -1)
    return ((coefficients * scales.gather(-1, levels)) @ v).transpose(1, 2), None


@dataclass
class Drawn:
    """Inputs of one call, by name, its document offsets and initial state."""

    tensors: dict[str, Tensor]
    cu_seqlens: Tensor | None
    state: FenwickState | None = None

    def to(self, dtype: torch.dtype, gates: torch.dtype, device: str = "cpu") -> "Drawn":
        """The same, rounded: decays, scales and slots to the dtype of gates."""
        wide = ("decay", "level_scales")
        tensors = {n: x.to(device, gates if n in wide else dtype) for n, x in self.tensors.items()}
        state = self.state and FenwickState(self.state.slots.to(device, gates), self.state.tokens)
        return Drawn(tensors, self.cu_seqlens, state)


def log_linear_inputs_of(tensors: dict[str, Tensor], **others: Any) -> LogLinearInputs:
    """Of the delta rule's form if there is a beta."""
    return (LogLinearDeltaInputs if "beta" in tensors else LogLinearInputs)(**{"decay": None} | tensors, **others)


def inputs(drawn: Drawn) -> LogLinearInputs:
    batch, tokens = drawn.tensors["v"].shape[:2]
    seen = () if drawn.state is None else tuple(drawn.state.tokens.tolist())
    return log_linear_inputs_of(drawn.tensors, scale=1.0, segments=Segments(batch, tokens, drawn.cu_seqlens), seen=seen)


def made_ready(calls: Iterable[Drawn]) -> None:
    """Compiles side by side what such calls need on the GPU where they are, with states and gradients."""
    from lasp.kernels.triton.dispatch import dry_run, in_blocks
    from lasp.kernels.triton.launch import compile_ahead
    from lasp.kernels.triton.log_linear.op import TritonLogLinear
    from lasp.kernels.triton.log_linear_delta.op import TritonLogLinearDelta

    def work() -> None:
        for x in map(in_blocks, map(inputs, calls)):
            op = TritonLogLinearDelta() if isinstance(x, LogLinearDeltaInputs) else TritonLogLinear()
            for wants_summary in (False, True):
                dry_run(op, x, wants_summary, backward=True)

    assert compile_ahead(work) is None


def results(gen, function, drawn: Drawn, upstream: dict, *, final: bool, **options) -> dict[str, Tensor]:
    """Outputs and every gradient, by name; upstream gradients are drawn when first needed."""
    leaves = {name: x.clone().requires_grad_() for name, x in drawn.tensors.items()}
    state = drawn.state
    if state is not None:
        leaves["slots"] = state.slots.clone().requires_grad_()
        options["initial_state"] = FenwickState(leaves["slots"], state.tokens)
    found = function(**{n: x for n, x in leaves.items() if n != "slots"}, cu_seqlens=drawn.cu_seqlens, **options)
    outputs = {"o": found[0], "final": found[1].slots} if final else {"o": found[0]}
    for name, x in outputs.items():
        upstream.setdefault(name, torch.randn(x.shape, generator=gen, dtype=F64))
    d_outputs = [upstream[name].to(x) for name, x in outputs.items()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), d_outputs, materialize_grads=True)
    named = outputs | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in named.items()}


def draw(gen, tokens, *, delta=False, batch=1, offsets=None, seen=None, levels=None, heads=(1, 2), sizes=(6, 4)):
    """seen: of every segment, the tokens of an initial state."""
    (q_heads, v_heads), (key_dim, value_dim) = heads, sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=F64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, dtype=F64)

    rows = batch, tokens, v_heads
    q, k = (normal(batch, tokens, q_heads, key_dim) for _ in range(2))
    total = max((max(seen) if seen else 0) + tokens, 1)
    tensors = {
        "q": q,
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": normal(*rows, value_dim),
        "decay": -uniform(*rows) * 8 / tokens,
        "level_scales": normal(*rows, levels or (total - 1).bit_length() + 1),
    }
    if delta:
        tensors["beta"] = uniform(*rows) * min(1.0, 16 / tokens)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    state = None
    if seen is not None:
        slots = normal(len(seen), max(seen).bit_length(), v_heads, key_dim, value_dim)
        state = FenwickState(slots, torch.tensor(seen, device="cpu"))
    return Drawn(tensors, cu_seqlens, state)
