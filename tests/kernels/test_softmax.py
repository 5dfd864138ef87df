"""Softmax attention and its log-sum-exp against the definition, by the fused kernels and by the dense form."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import attention as registry

from lasp.kernels import softmax_attention
from lasp.kernels.attention import CuDNN, Dense, Flash
from lasp.kernels.blocks import Block, Mask
from lasp.kernels.softmax import Accumulator, Sum, attend, attend_grad
from tests.parallel.inputs import F64, error
from tests.parallel.test_softmax import definition

BACKENDS = ("auto", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 9), (False, 9)])
@pytest.mark.parametrize("documents", [None, (0, 5, 5, 100, 300)])
def test_equals_the_definition(gen, backend, kv_heads, causal, window, documents):
    tokens = 300  # more than one tile of the dense form
    q, k, v = (torch.randn(1, tokens, h, 8, generator=gen, dtype=F64).requires_grad_() for h in (4, kv_heads, kv_heads))
    do = torch.randn(1, tokens, 4, 8, generator=gen, dtype=F64)
    wanted = definition(q, k, v, causal, window, documents)
    cu_seqlens = None if documents is None else torch.tensor(documents)
    o, lse = softmax_attention(q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, backend=backend)
    assert error(o, wanted) < 1e-10
    pairs = zip(torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(wanted, (q, k, v), do), strict=True)
    assert max(error(a, b) for a, b in pairs) < 1e-10
    assert lse.shape == (1, tokens, 4) and not lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp(gen, backend):
    q, k = (torch.randn(2, 40, 3, 8, generator=gen, dtype=F64) for _ in range(2))
    scores = torch.einsum("bihd,bjhd->bihj", q, k) * 0.5
    lse = softmax_attention(q, k, k, scale=0.5, causal=False, backend=backend)[1]
    assert error(lse, scores.logsumexp(-1)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_queries_are_the_last_of_a_longer_past(gen, backend, value_dim):
    q, k = (torch.randn(1, 50, 2, 8, generator=gen, dtype=F64) for _ in range(2))
    v = torch.randn(1, 50, 2, value_dim, generator=gen, dtype=F64)
    whole = softmax_attention(q, k, v)[0]
    for tokens in (1, 7):
        part = softmax_attention(q[:, -tokens:], k, v, backend=backend)[0]
        assert error(part, whole[:, -tokens:]) < 1e-10


def test_errors_do_not_grow_with_the_number_of_blocks(gen):
    """bf16: 16 x 16 blocks err little more than one block, as what they give is summed in fp32."""
    tokens, mask = 128, Mask(0.25, causal=False)
    q, k, v, do = (torch.randn(1, tokens, 2, 16, generator=gen, dtype=F64).bfloat16() for _ in range(4))

    def run(count: int, *tensors: Tensor) -> list[Tensor]:
        q, k, v, do = tensors
        cuts = list(pairwise(range(0, tokens + 1, tokens // count)))
        blocks = [Block(rows, cols) for rows in cuts for cols in cuts]
        total = Accumulator(q, v.shape[-1])
        attend(total, q, k, v, blocks, mask)
        grads = Sum(q), Sum(k), Sum(v)
        o, lse = total.result()
        attend_grad(do, q, k, v, o, lse, grads, blocks, mask)
        return [o, *(x.result() for x in grads)]

    exact = run(1, *(x.double() for x in (q, k, v, do)))
    one, many = ([error(a.double(), b) for a, b in zip(run(n, q, k, v, do), exact, strict=True)] for n in (1, 16))
    assert all(b <= 1.5 * a for a, b in zip(one, many, strict=True)), (one, many)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("block", "kernel"),
    [
        (Block((0, 1024), (0, 1024), right=0), CuDNN),
        (Block((0, 1024), (0, 2048)), CuDNN),
        (Block((0, 1024), (0, 1024), right=0), Flash),
        (Block((0, 300), (0, 400), left=70, right=5), Flash),
        (Block((0, 100, 400), (0, 300, 700), left=70, right=0), Flash),
    ],
)
def test_gpu_kernels_equal_the_dense_form(block, kernel):
    """In bf16, to 3 units of its rounding, by norm."""
    shapes = [(block.q[-1], 4), (block.k[-1], 2), (block.k[-1], 2), (block.q[-1], 4)]
    q, k, v, do = (torch.randn(1, t, h, 64, device="cuda").bfloat16() for t, h in shapes)

    def run(kernel, *tensors):
        q, k, v, do = tensors
        segments = block.segments if kernel is Dense else [block]
        parts = []
        for s in segments:
            o, lse = kernel.forward(q[:, s.rows], k[:, s.cols], v[:, s.cols], s, 0.125)
            grads = kernel.backward(do[:, s.rows], q[:, s.rows], k[:, s.cols], v[:, s.cols], o, lse, s, 0.125)
            parts.append((o, lse, *grads))
        return [torch.cat(xs, 1) for xs in zip(*parts, strict=True)]

    found, wanted = run(kernel, q, k, v, do), run(Dense, *(x.double() for x in (q, k, v, do)))
    errors = [error(a.double(), b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < 3 * 2**-8, errors


def test_bad_input_is_named():
    x = torch.zeros(1, 5, 4, 8)
    refused = {
        "4: \\[B, T, heads": lambda: softmax_attention(x[0], x[0], x[0]),
        "a multiple of k's 3": lambda: softmax_attention(x, x[:, :, :3], x[:, :, :3]),
        "k: got 4 tokens": lambda: softmax_attention(x, x[:, :4], x[:, :4]),
        "window": lambda: softmax_attention(x, x, x, window=0),
        "v: got shape": lambda: softmax_attention(x, x, x[:, :, :2]),
        "cu_seqlens": lambda: softmax_attention(x, x, x, cu_seqlens=torch.tensor([0, 6])),
        "backend": lambda: softmax_attention(x, x, x, backend="triton"),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_pytorch_keeps_the_flash_attention_that_was_chosen(monkeypatch, tmp_path):
    """It is one for the whole process, so no library's to change, even where FlashAttention 3 is installed."""
    if not hasattr(registry, "register_flash_attention_impl"):
        pytest.skip("this PyTorch knows no other flash attention than its own")
    called = []
    monkeypatch.setattr("torch.nn.attention._registry._FLASH_ATTENTION_IMPLS", {"FA3": lambda: called.append("FA3")})
    (tmp_path / "flash_attn_interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    Flash._arguments(Block((0, 8), (0, 8)), torch.device("cuda", 0))
    assert not called and registry.current_flash_attention_impl() is None
