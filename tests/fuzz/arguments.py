"""Arguments that fit or of which one does not, and what an op must make of them."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
SUMMED = {torch.float16: 10, torch.bfloat16: 10}  # gradients are sums over tokens, whose terms may cancel
Arguments = dict[str, Any]
Break = Callable[[Arguments], None]


def changed(name: str, change: Callable[[Any], Any]) -> Break:
    def apply(arguments: Arguments) -> None:
        arguments[name] = change(arguments[name])

    return apply


def spoilt(number: float) -> Callable[[Tensor], Tensor]:
    """One number of the tensor is this one."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x.view(-1)[x.numel() // 2] = number
        return x

    return change


def longer(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x, x.narrow(dim, 0, 1)], dim)


NO_TENSORS = [lambda _: None, lambda _: 3, lambda x: x.tolist(), lambda x: x.long(), lambda x: x.bool(), lambda x: x[0]]


def breaks_of(arguments: Arguments, tensors: dict[str, tuple[int, ...]]) -> list[Break]:
    """What makes arguments wrong that are right. tensors: names of tensors, and the dimensions that may not be others.

    An optional tensor may be left out, so None is not in its list.
    """
    found: list[Break] = []
    for name, dims in tensors.items():
        optional = name in ("decay", "bias", "initial_state", "initial_tail")
        if arguments[name] is None or arguments[name].numel() == 0:
            continue
        found += [changed(name, change) for change in NO_TENSORS[optional:]]
        found += [changed(name, longer(dim)) for dim in dims]
    for scale in (math.nan, math.inf, 0.0, "one", True, [1.0]):
        if "scale" in arguments:
            found.append(changed("scale", lambda _, scale=scale: scale))
    if (offsets := arguments["cu_seqlens"]) is not None:
        found += [
            changed("cu_seqlens", change)
            for change in (
                lambda x: x.float(),
                lambda x: x[None],
                lambda x: x + 1,
                lambda x: x.tolist(),
                lambda x: torch.cat([x, x[-1:] + 1]),
                lambda x: torch.cat([x[:1], x[-1:] + 1, x[-1:]]),
                lambda x: x[:1],
            )
        ]
        assert offsets[-1] > 0
    elif (x := arguments.get("q", arguments.get("x"))) is not None and x.shape[0] > 1:
        found.append(changed("cu_seqlens", lambda _: torch.tensor([0, x.shape[1]])))
    return found


@st.composite
def drawn(draw: st.DrawFn, make: Callable[..., tuple[Arguments, list[Break]]]) -> tuple[Arguments, bool]:
    """Arguments, and whether they are right."""
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    arguments, breaks = make(draw, gen)
    if not draw(st.booleans()):
        return arguments, True
    draw(st.sampled_from(breaks))(arguments)
    return arguments, False


def boundaries(draw: st.DrawFn, tokens: int) -> tuple[int, Tensor | None]:
    """(batch, cu_seqlens): rows, or packed documents, some of them empty."""
    if draw(st.booleans()):
        return draw(st.integers(1, 3)), None
    inner = sorted(draw(st.lists(st.integers(0, tokens), max_size=4)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return 1, torch.tensor([0, *inner, tokens], dtype=dtype)


def sequences(batch: int, cu_seqlens: Tensor | None, tokens: int) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each."""
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(batch)]
    offsets = cu_seqlens.tolist()
    return [(0, begin, end) for begin, end in pairwise(offsets)]


def check(op: Callable, definition: Callable, case: tuple[Arguments, bool], leaves: tuple[str, ...]) -> None:
    """Outputs and gradients are those of the definition in float64, or, if an argument is wrong, it is refused."""
    arguments, right = case
    if not right:
        with pytest.raises(ValueError, match=r"\S"):
            op(**arguments)
        return
    leaves = tuple(name for name in leaves if arguments[name] is not None)
    here = {name: arguments[name].clone().requires_grad_() for name in leaves}
    exact = {name: arguments[name].double().requires_grad_() for name in leaves}
    found = [x for x in op(**(arguments | here)) if x is not None]
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
    wanted = definition(**(wide | exact))
    assert len(found) == len(wanted)
    gen = torch.Generator().manual_seed(0)
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=gen) for x in wanted]
    grads = torch.autograd.grad(
        [x for x in found if x.requires_grad],
        list(here.values()),
        [d.to(x.dtype) for x, d in zip(found, upstream, strict=True) if x.requires_grad],
        allow_unused=True,
    )
    expected = torch.autograd.grad(
        [y for x, y in zip(found, wanted, strict=True) if x.requires_grad],
        list(exact.values()),
        [d for x, d in zip(found, upstream, strict=True) if x.requires_grad],
        allow_unused=True,
    )
    dtype = arguments[next(iter(leaves))].dtype
    least = 0.1 * sum(d.norm() for d in upstream)  # gradients may be differences of numbers of this size
    for name, x, y in zip((*range(len(found)), *leaves), (*found, *grads), (*wanted, *expected), strict=True):
        x = torch.zeros_like(y) if x is None else x.double()
        y = torch.zeros_like(x) if y is None else y
        bound = BOUNDS[dtype] * (SUMMED.get(dtype, 1) if name in leaves else 1)
        assert x.shape == y.shape, name
        assert (x - y).norm() < bound * max(y.norm(), least if name in leaves else 1e-3), name
