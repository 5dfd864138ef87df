"""What autograd may ask of every operation besides its gradients."""

import pytest
import torch
from torch import Tensor

from lasp.kernels import (
    delta_rule,
    linear_attention,
    log_linear_attention,
    log_linear_delta_rule,
    softmax_attention,
)
from lasp.kernels.swiglu import swiglu

TOKENS, HEADS = 5, 2


def inputs(gen: torch.Generator) -> dict[str, Tensor]:
    shape = 1, TOKENS, HEADS
    x = {name: torch.randn(*shape, 3, generator=gen, dtype=torch.float64) for name in ("q", "k", "v")}
    x["decay"] = -torch.rand(shape, generator=gen, dtype=torch.float64)
    x["beta"] = torch.rand(shape, generator=gen, dtype=torch.float64)
    x["level_scales"] = torch.rand(*shape, 4, generator=gen, dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in x.items()}


RECURRENCES = {
    "linear_attention": (linear_attention, ("decay",)),
    "delta_rule": (delta_rule, ("beta", "decay")),
    "log_linear_attention": (log_linear_attention, ("decay", "level_scales")),
    "log_linear_delta_rule": (log_linear_delta_rule, ("beta", "decay", "level_scales")),
}


def by_name(name: str, x: dict[str, Tensor], **options):
    op, more = RECURRENCES[name]
    return op(**{argument: x[argument] for argument in ("q", "k", "v", *more)}, **options)


ONCE = {name: lambda x, name=name: by_name(name, x)[0] for name in RECURRENCES} | {
    "softmax_attention": lambda x: softmax_attention(x["q"], x["k"], x["v"])[0],
    "swiglu": lambda x: swiglu(torch.cat([x["q"], x["k"]], -1)),
}


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_are_refused(gen, name):
    """Also beside terms that have some, and where no gradient that comes in has a graph: they would lack a part."""
    x = inputs(gen)
    loss = ONCE[name](x).sum() + (x["q"] ** 3).sum()
    with pytest.raises(RuntimeError, match="got create_graph=True, expected False"):
        torch.autograd.grad(loss, x["q"], create_graph=True)


@pytest.mark.parametrize("name", RECURRENCES)
def test_outputs_may_be_changed_in_place(gen, name):
    """As those of PyTorch's own operations may, and as a layer's gate does."""
    x = inputs(gen)
    gate = torch.randn(1, TOKENS, HEADS, 1, generator=gen, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((by_name(name, x)[0] * gate).sum(), x["k"])
    o, state = by_name(name, x, output_final_state=True)
    o *= gate
    slots = state if isinstance(state, Tensor) else state.slots
    slots *= 0
    (found,) = torch.autograd.grad(o.sum() + slots.sum(), x["k"])
    torch.testing.assert_close(found, wanted)


def test_what_backward_reads_may_not_be_changed_in_place(gen):
    x = inputs(gen)
    o, state = linear_attention(x["q"], x["k"], x["v"], causal=False, output_final_state=True)
    state *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
