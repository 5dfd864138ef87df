"""How kernels start. Triton looks at every argument anew in each call, and compiles a kernel when it first comes; here
the first is remembered for each kind of arguments, and all kernels of an op are compiled side by side. What needs more
shared memory than a GPU has, since it was made for a larger one, fetches fewer steps ahead."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

COMPILERS = 16  # at once
TRITONS_STAGES = 3  # of a kernel that says nothing of them
INTERPRETED = triton.knobs.runtime.interpret
_compiled: dict[tuple, tuple[Callable[..., None], tuple, tuple]] = {}  # how it runs, and its arguments before and after
_thread = threading.local()
_ahead: ContextVar[list[Any] | None] = ContextVar("kernels that are compiled ahead", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, pdl: bool = False, **constants: Any) -> None:
    """kernel[grid](*args, **constants), on the current device, where the tensors must be.

    args: all parameters of the kernel that are not constants, in its order: tensors, their descriptors, numbers and
    None. constants: those that are, and options. pdl: it may begin before the kernel before has ended, and sees to
    that itself (lasp.kernels.triton.pdl).
    """
    if (ahead := _ahead.get()) is not None:
        constants |= _pdl_option(pdl)
        again = partial(kernel.warmup, *args, grid=grid)
        ahead.append((again(**constants), again, constants))
        return
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    device = driver.active.get_current_device()
    key: list[Any] = [id(kernel), device, pdl]  # Triton makes one kernel where all of this is the same
    values, described = list(args), False
    for place, arg in enumerate(args):
        kind = type(arg)
        if kind is int:
            key.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * (arg < 2**31))
        elif arg is None or kind is float:
            key.append(kind)
        elif isinstance(arg, Tensor):
            values[place] = address = arg.data_ptr()
            key.append(arg.dtype if address % 16 == 0 else (arg.dtype, "unaligned"))
        elif hasattr(arg, "block_shape"):
            described = True
            key.append((arg.base.dtype, *arg.block_shape))
        else:
            key.append(kind)
    found = _compiled.get(full := (*key, *constants.values()))
    if described:
        _enter_context()
    if found is None:
        compiled, fitting = launch_first(kernel, grid, args, constants | _pdl_option(pdl))
        rest = tuple(fitting[name] for name in kernel.arg_names[len(args) :])
        _compiled[full] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), rest
        return
    run, made, rest = found
    run(*(*grid, 1, 1)[:3], driver.active.get_current_stream(device), *made, *values, *rest)


def _pdl_option(pdl: bool) -> dict[str, bool]:
    can = pdl and not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)
    return {"launch_pdl": True} if can else {}


def launch_first(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The kernel, compiled and launched, with these constants but as many stages as fit; and the constants."""
    while True:
        try:
            return kernel[grid](*args, **constants), constants
        except OutOfResources as error:
            error.__traceback__ = None  # Triton keeps it, and so the graph of whoever called
            constants = _with_fewer_stages(constants, error)


def _with_fewer_stages(constants: dict[str, Any], error: OutOfResources) -> dict[str, Any]:
    """Those of a kernel that needs less of what it had too much of; raises the error if there are none."""
    name = "STAGES" if "STAGES" in constants else "num_stages"
    stages = constants.get(name, TRITONS_STAGES)
    if error.name != "shared memory" or stages == 1:
        raise error
    return constants | {name: stages - 1}


def _enter_context() -> None:
    """Descriptors are made by the driver, in the thread's context, which autograd's threads do not have at first."""
    if not hasattr(_thread, "entered"):
        _thread.entered = torch.cuda.mem_get_info()


def run_dry(work: Callable[[], None]) -> list[Any]:
    """Compiles the kernels that `work` launches, but starts none; its tensors need no memory (device "meta"). Returns
    each with how to compile it again, and its constants."""
    ahead: list[Any] = []
    token = _ahead.set(ahead)
    try:
        work()
    finally:
        _ahead.reset(token)
    return ahead


def compile_ahead(work: Callable[[], None]) -> OutOfResources | None:
    """Compiles the kernels that `work` launches (see run_dry) side by side, on other threads, and asks the GPU whether
    they fit: if one does not, however few stages it has, returns what it lacks."""
    device = torch.cuda.current_device()

    def lacks(dry: tuple[Any, Callable[..., Any], dict[str, Any]]) -> OutOfResources | None:
        compiled, again, constants = dry
        with torch.cuda.device(device):
            while True:
                try:
                    _ = (compiled.result() if hasattr(compiled, "result") else compiled).run  # it is loaded
                    return None
                except OutOfResources as error:
                    try:
                        constants = _with_fewer_stages(constants, error)
                    except OutOfResources:
                        return error
                compiled = again(**constants)

    with ThreadPoolExecutor(COMPILERS) as executor:
        with triton.AsyncCompileMode(executor):
            kernels = run_dry(work)
        return next(filter(None, list(executor.map(lacks, kernels))), None)
