"""Softmax attention and its log-sum-exp against the definition, by the fused kernels and by the dense form."""

import pytest
import torch

from lasp.kernels import softmax_attention
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
