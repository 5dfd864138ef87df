"""Whatever backend="auto" picks runs, and is right: heads of every size and dtype, on a GPU."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import MODELS
from lasp.kernels import delta_rule, linear_attention
from lasp.kernels.linear import choose_op
from lasp.kernels.reference.chunk import ChunkedOp
from lasp.kernels.segments import Segments
from tests.parallel.inputs import error, inputs_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCH, TOKENS, Q_HEADS, HEADS = 2, 333, 2, 4
HALF = (torch.bfloat16, torch.float16)
SIZES = [(64, 64), (128, 128), (128, 256), (256, 128), (192, 160), (256, 256)]
CASES = [(k, v, dtype) for k, v in SIZES for dtype in (*HALF, torch.float32) if max(k, v) <= 128 or dtype in HALF]


@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "diagonal"])
@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize(("k", "v", "dtype"), CASES, ids=[f"{k}x{v}-{dtype}" for k, v, dtype in CASES])
def test_every_size_of_heads(gen, k, v, dtype, delta, decay):
    check(gen, Q_HEADS, HEADS, k, v, dtype, delta, decay)


@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_heads_as_models_have_them(gen, shape):
    """All that share a q/k head, of one or two of those."""
    q_heads = min(2, shape.q_heads)
    heads, delta, dtype = q_heads * shape.heads // shape.q_heads, "delta" in shape.op, getattr(torch, shape.dtype)
    decay = {"delta": "none", "gated delta": "scalar", "diagonal delta": "diagonal"}.get(shape.op, shape.op)
    check(gen, q_heads, heads, shape.key_dim, shape.value_dim, dtype, delta, decay)


def check(gen, q_heads: int, heads: int, k: int, v: int, dtype: torch.dtype, delta: bool, decay: str) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen)

    rows = BATCH, TOKENS, heads
    gates = {"none": None, "constant": (heads,), "scalar": rows, "diagonal": (*rows, k)}[decay]
    tensors = {
        "q": normal(BATCH, TOKENS, q_heads, k),
        "k": torch.nn.functional.normalize(normal(BATCH, TOKENS, q_heads, k), dim=-1),
        "v": normal(*rows, v),
    }
    if delta:
        tensors["beta"] = torch.rand(rows, generator=gen)
    tensors = {n: x.to("cuda", dtype) for n, x in tensors.items()}
    if gates is not None:
        tensors["decay"] = -0.05 * torch.rand(gates, generator=gen).cuda()
    tensors["initial_state"] = normal(BATCH, heads, k, v).cuda()
    upstream = normal(*rows, v).to("cuda", dtype), normal(BATCH, heads, k, v).cuda()

    x = inputs_of(*(tensors.get(n) for n in ("q", "k", "v", "decay", "beta")), 1.0, Segments(BATCH, TOKENS))
    assert not isinstance(choose_op(x, "auto", False), ChunkedOp), "no kernels serve"

    def results(backend: str, cast) -> dict[str, Tensor]:
        given = {n: cast(x) for n, x in tensors.items()}
        leaves = {n: x.detach().clone().requires_grad_() for n, x in given.items() if x.ndim > 1}
        op = delta_rule if delta else linear_attention
        found = op(**(given | leaves), output_final_state=True, backend=backend)
        grads = torch.autograd.grad(found, list(leaves.values()), [cast(d) for d in upstream])
        return dict(zip(["o", "final_state", *leaves], [*found, *grads], strict=True))

    got, wanted = results("auto", lambda x: x), results("reference", Tensor.double)
    found = {n: error(got[n].double(), wanted[n]) for n in wanted}
    gate = found.pop("decay", 0.0)
    exact = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert gate < (exact if decay == "scalar" and not delta else 5e-2), gate  # the others' is left of larger terms
    assert max(found.values()) < max(2 * torch.finfo(dtype).eps, 1e-5), found
