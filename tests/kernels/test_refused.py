"""Arguments that every operation refuses by name, whatever kind of tensor or size they are."""

import re

import pytest
import torch
from torch import Tensor

from lasp.kernels import (
    causal_conv1d,
    delta_rule,
    linear_attention,
    log_linear_attention,
    log_linear_delta_rule,
    short_conv,
    softmax_attention,
)
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.parts import Part, Parts

ROWS = 1, 4, 2  # B, T, H
HEADS = {name: torch.randn(*ROWS, 3) for name in ("q", "k", "v")}
DECAY, BETA = {"decay": -torch.rand(ROWS)}, {"beta": torch.rand(ROWS)}
SCALES = {"level_scales": torch.rand(*ROWS, 3)}
STATE, SLOTS, SEEN = torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 2, 3, 3), torch.tensor([1])
CONV = {"x": torch.randn(1, 4, 6), "weight": torch.randn(6, 3), "bias": torch.randn(6)}
OPS = {
    linear_attention: HEADS | DECAY,
    delta_rule: HEADS | DECAY | BETA,
    log_linear_attention: HEADS | DECAY | SCALES,
    log_linear_delta_rule: HEADS | DECAY | BETA | SCALES,
    softmax_attention: HEADS,
    causal_conv1d: CONV,
    short_conv: CONV | {"parts": Parts(1, (Part(2), Part(4)))},
}
NAMED = {op.__name__: op for op in OPS}
BY_HEADS = [name for name, op in NAMED.items() if "q" in OPS[op]]
WITH_STATES = ["linear_attention", "delta_rule"]
LOG_LINEAR = ["log_linear_attention", "log_linear_delta_rule"]
CONVOLUTIONS = ["causal_conv1d", "short_conv"]


def refuses(name: str, message: str, **changed: object) -> None:
    arguments = OPS[NAMED[name]] | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        NAMED[name](**arguments)


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_dense_floating_point_tensor(name):
    for argument, x in OPS[NAMED[name]].items():
        if isinstance(x, Tensor):
            refuses(name, f"{argument}: got layout torch.sparse_coo", **{argument: x.to_sparse()})
            if argument not in ("q", "k", "v"):
                refuses(name, f"{argument}: got dtype torch.float8", **{argument: x.to(torch.float8_e4m3fn)})
            refuses(name, f"{argument}: got dtype torch.int64", **{argument: x.long()})


@pytest.mark.parametrize("name", BY_HEADS)
def test_no_heads_or_channels(name):
    given = OPS[NAMED[name]]
    refuses(name, "expected at least one", **{argument: x[:, :, :0] for argument, x in given.items()})
    for arguments in (("q", "k"), ("v",)):
        refuses(name, "expected at least one", **{argument: given[argument][..., :0] for argument in arguments})


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_state_elsewhere(name):
    refuses(name, "initial_state: got device meta", initial_state=STATE.to("meta"))


@pytest.mark.parametrize("name", LOG_LINEAR)
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((SLOTS, SEEN), "initial_state: got a tuple, expected a FenwickState"),
        (FenwickState(SLOTS, None), "initial_state.tokens: got None, expected a tensor"),  # type: ignore[arg-type]
        (FenwickState([SLOTS], SEEN), "initial_state.slots: got a list, expected a tensor"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_fenwick_state(name, state, message):
    refuses(name, message, initial_state=state)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_nothing(name):
    refuses(name, "weight: got shape [6, 0]", weight=CONV["weight"][:, :0])
    refuses(name, "x: got shape [1, 4, 0]", x=CONV["x"][..., :0], weight=CONV["weight"][:0], bias=None)
    refuses(name, "initial_tail: got device meta", initial_tail=torch.zeros(1, 2, 6, device="meta"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "got a NoneType, expected a Parts"),
        ((Part(6),), "got a tuple, expected a Parts"),
        (Parts(1, (Part(-1), Part(7))), "got sizes [-1, 7]"),
        (Parts(1, (Part(0), Part(6))), "got sizes [0, 6]"),
    ],
)
def test_parts_that_are_none(parts, message):
    refuses("short_conv", f"parts: {message}", parts=parts)


@pytest.mark.parametrize("name", ["linear_attention", "softmax_attention"])
@pytest.mark.parametrize("causal", ["no", None, 0])
def test_causal_is_true_or_false(name, causal):
    changed = {} if name == "softmax_attention" else {"decay": None}
    refuses(name, f"causal: got {causal!r}, expected True or False", causal=causal, **changed)


@pytest.mark.parametrize("name", [*BY_HEADS, *CONVOLUTIONS])
def test_no_sequences_are_served(name):
    """The one size that may be 0."""
    given = OPS[NAMED[name]]
    empty = {argument: x[:0] for argument, x in given.items() if isinstance(x, Tensor) and x.ndim > 2}
    leaves = {argument: x.requires_grad_() for argument, x in empty.items()}
    options = {} if name in (*CONVOLUTIONS, "softmax_attention") else {"output_final_state": True}
    results = NAMED[name](**(given | leaves), **options)
    first = results if isinstance(results, Tensor) else results[0]
    assert first.shape[0] == 0
    first.sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves.values())
