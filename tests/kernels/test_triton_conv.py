"""Triton's convolution, in the interpreter where there is no GPU, against the same in float64 by PyTorch."""

import pytest
import torch
from torch import Tensor

from lasp.kernels.conv import convolve
from lasp.kernels.parts import Part, Parts
from lasp.kernels.segments import Segments
from tests.parallel.inputs import error

conv = pytest.importorskip("lasp.kernels.triton.conv")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not conv.triton.knobs.runtime.interpret, reason="needs a GPU or Triton's interpreter"
)
SHAPES = {  # heads, parts, width, whether there is a bias
    "one head": (1, (Part(40),), 4, True),
    "wider than a block": (1, (Part(150), Part(6), Part(6)), 4, True),
    "unit length": (3, (Part(8, unit_length=True), Part(8, unit_length=True), Part(12)), 4, False),
    "token shift": (2, (Part(5),), 2, False),
    "no look back": (2, (Part(5),), 1, True),
}
DOCUMENTS = [0, 1, 3, 3, 40, 51]
HALF = [("unit length", torch.bfloat16), ("unit length", torch.float16)]


def results(call, tensors: dict[str, Tensor], upstream: list[Tensor]) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    found = call(**leaves)
    grads = torch.autograd.grad(found, list(leaves.values()), [d.to(found[0].dtype) for d in upstream])
    names = [f"part {i}" for i in range(len(found))] + [f"d{name}" for name in leaves]
    return dict(zip(names, [*found, *grads], strict=True))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), *HALF])
def test_equals_the_definition(monkeypatch, gen, shape: str, dtype: torch.dtype, silu: bool, packed: bool):
    monkeypatch.setattr(conv, "TILE", 32)
    monkeypatch.setattr(conv, "AHEAD", 4)
    heads, kinds, width, has_bias = SHAPES[shape]
    parts = Parts(heads, kinds)
    offsets = torch.tensor(DOCUMENTS, device=DEVICE) if packed else None
    batch, tokens = (1, DOCUMENTS[-1]) if packed else (2, 37)
    segments = Segments(batch, tokens, offsets)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=gen).to(DEVICE, dtype)

    tensors = {"x": normal(batch, tokens, parts.channels), "weight": normal(parts.channels, width)}
    if has_bias:
        tensors["bias"] = normal(parts.channels)
    if width > 1 and not (shape == "one head" and not packed):  # which begins with zeros
        tensors["tail"] = normal(segments.count, width - 1, parts.channels)
    upstream = [normal(batch, tokens, heads, part.size) for part in kinds]

    def by_kernels(x, weight, bias=None, tail=None):
        return conv.Convolution.apply(x, weight, bias, tail, segments, silu, parts)

    def by_definition(x, weight, bias=None, tail=None):
        return convolve(x, weight, bias, tail, segments, silu, parts, backend="reference")

    got = results(by_kernels, tensors, upstream)
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = results(by_definition, exact, [d.double() for d in upstream])
    found = {name: error(got[name].double(), wanted[name]) for name in wanted}
    assert max(found.values()) < max(2 * torch.finfo(dtype).eps, 2e-6), found


def test_rows_that_lie_apart(gen):
    """A part of a wider projection is read where it lies."""
    wide = torch.randn(2, 40, 48, generator=gen).to(DEVICE)
    x, weight, parts = wide[..., 16:32], torch.randn(16, 4, generator=gen).to(DEVICE), Parts(1, (Part(16),))
    segments = Segments(2, 40)
    (y,) = conv.Convolution.apply(x, weight, None, None, segments, True, parts)
    (wanted,) = conv.Convolution.apply(x.contiguous(), weight, None, None, segments, True, parts)
    assert torch.equal(y, wanted)


def test_sums_over_many_tokens_keep_their_digits(gen):
    """Of weights' gradients in half precision."""
    x, dy = (torch.ones(1, 3000, 16, device=DEVICE, dtype=torch.float16) for _ in range(2))
    weight = torch.zeros(16, 3, device=DEVICE, dtype=torch.float16, requires_grad=True)
    (y,) = conv.Convolution.apply(x, weight, None, None, Segments(1, 3000), False, Parts(1, (Part(16),)))
    (dw,) = torch.autograd.grad(y, weight, dy[:, :, None])
    wanted = torch.tensor([2998.0, 2999.0, 3000.0], dtype=torch.float16, device=DEVICE)
    assert torch.equal(dw, wanted.expand_as(dw))
