"""Triton's interpreter, quicker. For each operation it makes the types of results anew, and for each call of a device
function it looks through its whole language: most of the time of small kernels. Here it remembers what it found."""

from functools import cache
from math import prod

import triton.language as tl
from triton.language.core import block_type, constexpr, tensor
from triton.runtime import interpreter


def hasten() -> None:
    interpreter._patch_lang = _patched_once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _known_by_name(interpreter._get_np_dtype)
    block_type.__init__ = _known_by_shape(block_type.__init__)
    tensor.__init__ = _init_tensor


def _patched_once_a_launch(patch):
    """A device function finds what its launch has put in place."""

    def patch_if_new(function):
        seen = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        return patch(function) if any(tl.core.is_builtin(module.load) for module in seen) else None

    return patch_if_new


def _known_by_name(function):
    known = {}

    def of(dtype):
        if dtype.name not in known:
            known[dtype.name] = function(dtype)
        return known[dtype.name]

    return of


def _known_by_shape(init):
    known = {}

    def init_block_type(self, element_ty, shape):
        key = (element_ty.name, *[n.value if type(n) is constexpr else n for n in shape])
        if key not in known:
            init(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init_block_type


@cache
def _constant(shape: tuple[int, ...]) -> tuple[tl.core.tuple, constexpr]:
    """A tensor's shape and number of elements, as its kernel sees them."""
    return tl.core.tuple([constexpr(n) for n in shape]), constexpr(prod(shape))


def _init_tensor(self, handle, dtype) -> None:
    self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
    self.shape, self.numel = _constant(tuple(dtype.shape) if dtype.is_block() else ())
