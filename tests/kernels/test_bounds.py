"""The check of kernels' addresses (conftest.py) itself."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checks Triton's interpreter")


@triton.jit
def copy(x, y, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < count), mask=i < count)


@pytest.mark.parametrize("count", [1, 15])
def test_masked_accesses_pass(count):
    x, y = torch.rand(count), torch.zeros(count)
    copy[(1,)](x, y, count, BLOCK=16)
    assert torch.equal(x, y)


@pytest.mark.parametrize(("from_size", "to_size"), [(15, 16), (16, 15)])
def test_an_access_beside_a_tensor_fails(from_size, to_size):
    with pytest.raises(Exception, match="beside the tensor"):
        copy[(1,)](torch.zeros(from_size), torch.zeros(to_size), 16, BLOCK=16)
