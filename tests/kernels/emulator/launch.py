"""How kernels are translated and launched."""

import sys
from collections.abc import Callable
from itertools import product
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language.core import constexpr, dtype
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from tests.kernels.emulator import language, program
from tests.kernels.emulator.values import Layout, Pointer, Shared, Value

BY_NAME = {
    "gl": language.language,
    "tl": language.language,
    **{name: getattr(language, name) for name in ("tma", "mbarrier", "async_copy")},
    **{name: getattr(language, name) for name in ("warpgroup_mma", "warpgroup_mma_wait", "mma_v2")},
    "barrier": lambda: None,  # warps of a group go on together
    "fence_async_shared": lambda: program.current().fence(),
    "griddepcontrol_wait": lambda: program.current().wait_for_kernel(),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
_translated: dict[int, Any] = {}
Shared.load = lambda self, layout=None: Value(self.x.clone())  # type: ignore[attr-defined]
Shared.store = language.store  # type: ignore[attr-defined]


def install(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every kernel that lasp.kernels.triton.launch starts is run here, with groups of warps in an order of the seed."""
    before: list[tuple[set[int], set[int]]] = [(set(), set())]

    def start(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **constants: Any) -> None:
            early = sys._getframe(1).f_locals["pdl"]  # launch keeps it from Triton's interpreter
            before[0] = _run(kernel.fn, grid, seed, before[0] if early else None, args, constants)

        return run

    for kind in (GluonJITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", start)


def _run(
    function: Any, grid: tuple[int, ...], seed: int, before: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[set[int], set[int]]:
    """Program after program. Returns what has been read and written."""
    warps, read, written = constants["num_warps"], set[int](), set[int]()
    constants = {name: _translate("", x) for name, x in constants.items() if name not in OPTIONS}
    kernel, given, grid = _rebuild(function), tuple(map(_argument, args)), (*grid, 1, 1)[:3]
    for n, number in enumerate(product(*map(range, grid))):
        program.run(one := program.Program(number, grid, warps, seed + n, before), kernel, given, constants)
        read |= one.read
        written |= one.written
    return read, written


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.detach().view(-1))
    if isinstance(x, (int, float)):
        return Value(torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int32))
    return language.Descriptor(x) if hasattr(x, "block_shape") else x


def _translate(name: str, x: Any) -> Any:
    """What stands for something that a kernel finds under a name."""
    if name in BY_NAME:
        return BY_NAME[name]
    if isinstance(x, constexpr):
        return _translate(name, x.value)
    if isinstance(x, dtype):
        return language.DTYPES[x.name.replace("fp", "float").replace("bf16", "bfloat16")]
    if isinstance(x, (GluonJITFunction, JITFunction, InterpretedFunction, ConstexprFunction)):
        return _rebuild(x.fn)
    if isinstance(x, type) and getattr(x, "__triton_aggregate__", False):
        return _struct(x)
    return Layout() if type(x).__name__.endswith("Layout") else x


def _rebuild(function: Any) -> Callable[..., Any]:
    """The function, whose names stand for what is here."""
    if id(function) not in _translated:
        names: dict[str, Any] = {}
        defaults = tuple(_translate("", x) for x in function.__defaults__ or ())
        made = FunctionType(function.__code__, names, function.__name__, defaults, function.__closure__)
        _translated[id(function)] = made
        used = set(function.__code__.co_names)
        names |= {name: _translate(name, x) for name, x in function.__globals__.items() if name in used}
    return _translated[id(function)]


def _struct(kind: Any) -> type:
    """An aggregate."""
    if id(kind) not in _translated:
        methods = {n: _rebuild(x.fn) for n, x in vars(kind).items() if isinstance(x, (GluonJITFunction, JITFunction))}
        _translated[id(kind)] = type(kind.__name__, (), methods | {"__init__": _rebuild(kind.hash_attrs[0].fn)})
    return _translated[id(kind)]
