"""Tensors that do not lie in one piece give what their contiguous copies give: inputs and gradients that come in. And
tensors of nothing."""

import pytest
import torch
from torch import Tensor

from lasp.kernels import causal_conv1d, delta_rule, linear_attention, softmax_attention
from lasp.kernels.experts import RowOrder, grouped_matmul, grouped_matmul_fused, tally
from tests.parallel.inputs import error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def apart(x: Tensor) -> Tensor:
    """With the last dimension's elements apart: every second one of twice as many."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


def turned(x: Tensor) -> Tensor:
    """With memory's order reversed."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def shifted(x: Tensor) -> Tensor:
    """Rows in one piece, beginning one element beyond a wider row's begin."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def repeated(x: Tensor) -> Tensor:
    """The first token's values for all of them, from one place in memory."""
    return x[:, :1].expand(x.shape) if x.ndim > 1 else x


def scattered(x: Tensor) -> Tensor:
    """The first element for all of a row, as the gradient of a sum."""
    return x[..., :1].expand(x.shape)


LAYOUTS = (apart, turned, shifted, repeated, scattered)
OPS = {
    "linear": (lambda q, k, v, s: linear_attention(q, k, v, initial_state=s, output_final_state=True), "qkvs"),
    "not causal": (lambda q, k, v: linear_attention(q, k, v, causal=False)[0], "qkv"),
    "scalar": (lambda q, k, v, g, s: linear_attention(q, k, v, -g * g, initial_state=s)[0], "qkvgs"),
    "decays": (lambda q, k, v, n: linear_attention(q, k, v, n)[0], "qkvn"),
    "delta": (lambda q, k, v, b, n, s: delta_rule(q, k / 4, v, b, n, initial_state=s), "qkvbns"),
    "softmax": (lambda q, k, v: softmax_attention(q, k, v)[0], "qkv"),
    "softmax, grouped": (lambda q, r, t: softmax_attention(q, r, t)[0], "qrt"),
    "softmax, dense": (lambda q, k, v: softmax_attention(q, k, v, backend="reference")[0], "qkv"),
    "softmax, packed": (
        lambda q, k, v: softmax_attention(
            q[:1], k[:1], v[:1], window=9, cu_seqlens=torch.tensor([0, 3, 20], device=q.device)
        )[0],
        "qkv",
    ),
    "convolution": (lambda x, w, i, a: causal_conv1d(x, w, i, initial_tail=a), "xwia"),
    "packed convolution": (
        lambda x, w: causal_conv1d(x[:1], w, cu_seqlens=torch.tensor([0, 3, 20], device=x.device)),
        "xw",
    ),
    "experts": (lambda e, m: grouped_matmul(e, m, tally(torch.tensor([0, 0, 2], device=e.device), 3)), "em"),
    "rows in order": (lambda e: RowOrder.sorting(torch.tensor([2, 0, 1], device=e.device)).apply(e), "e"),
}
SHAPES = {
    **dict.fromkeys("qkv", (2, 20, 2, 16)), **dict.fromkeys("rt", (2, 20, 1, 16)), **dict.fromkeys("gb", (2, 20, 2)),
    "n": (2, 20, 2, 16), "s": (2, 2, 16, 16), "x": (2, 20, 6), "w": (6, 4), "i": (6,), "a": (2, 3, 6), "e": (3, 8),
    "m": (3, 8, 16),
}  # fmt: skip


def outcome(op, names: str, tensors: dict[str, Tensor], arrange, arrange_grad) -> list[Tensor]:
    """What the op gives, and all gradients, with its inputs and the gradients that come in laid out so."""
    leaves = {n: arrange(tensors[n]).detach().requires_grad_() for n in names}
    found = op(*leaves.values())
    outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    upstream = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).cos().view(x.shape) for x in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), [arrange_grad(d) for d in upstream])
    return [x.detach() for x in (*outputs, *grads)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", OPS)
def test_layouts_change_nothing(gen, name, layout):
    op, names = OPS[name]
    tensors = {n: torch.randn(SHAPES[n], generator=gen, dtype=torch.float64).to(DEVICE) for n in names}
    if "b" in tensors:  # a strength of writing
        tensors["b"] = tensors["b"].sigmoid()
    if "n" in tensors:  # a log decay
        tensors["n"] = -tensors["n"].abs()
    for inputs, grads in ((layout, torch.clone), (torch.clone, layout), (layout, layout)):
        wanted = outcome(op, names, tensors, *(lambda x, f=f: f(x).contiguous() for f in (inputs, grads)))
        got = outcome(op, names, tensors, inputs, grads)
        assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-10


@pytest.mark.parametrize(
    "name", [name for name in OPS if "packed" not in name and not name.endswith(("experts", "order"))]
)
def test_no_sequences_at_all(name):
    """Empty outputs, and gradients of zero for what all sequences share."""
    op, names = OPS[name]
    tensors = {n: torch.ones(SHAPES[n] if n in "wi" else (0, *SHAPES[n][1:]), device=DEVICE) for n in names}
    found = outcome(op, names, tensors, torch.clone, torch.clone)
    assert all(x.numel() == 0 for x in found[: -len(names)])
    assert all(x.shape == tensors[n].shape and not x.any() for n, x in zip(names, found[-len(names) :], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_one_kernel_for_all_experts(gen, layout):
    counts = torch.tensor([2, 0, 1], device=DEVICE)
    tensors = {n: torch.randn(SHAPES[n], generator=gen).to(DEVICE, torch.bfloat16) for n in "em"}

    def op(e, m):
        return grouped_matmul_fused(e, m, counts)

    wanted = outcome(op, "em", tensors, lambda x: layout(x).contiguous(), lambda x: layout(x).contiguous())
    got = outcome(op, "em", tensors, layout, layout)
    assert max(error(a.double(), b.double()) for a, b in zip(got, wanted, strict=True)) < 2**-7


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_fused_kernels_of_gpus(gen, layout, tokens):
    """PyTorch's flash attention and cuDNN's, and Triton's linear attention."""
    x = {n: torch.randn((2, tokens, 2, 64), generator=gen).to(DEVICE, torch.bfloat16) for n in "qkv"}
    for op in (lambda *t: softmax_attention(*t)[0], lambda *t: linear_attention(*t)[0]):
        wanted = outcome(op, "qkv", x, lambda t: layout(t).contiguous(), lambda t: layout(t).contiguous())
        got = outcome(op, "qkv", x, layout, layout)
        assert max(error(a.double(), b.double()) for a, b in zip(got, wanted, strict=True)) < 2**-7
