"""What kernels compute with: tensors and numbers in registers, places in a GPU's memory, and shared memory."""

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Any."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.parent = self


def plain(x: Any) -> Any:
    return x.x if isinstance(x, Value) else x


def operator(compute: Callable[[Any, Any], Tensor], swapped: bool = False) -> Callable[[Any, Any], "Value"]:
    """Of two values, of which a number of Python's has no dtype of its own."""

    def apply(self: Any, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        a, b = self.x, plain(other)
        if isinstance(b, Tensor):
            common = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(common), b.to(common)
        return Value(torch.as_tensor(compute(b, a) if swapped else compute(a, b)))

    return apply


def divide(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), torch.as_tensor(b), rounding_mode="trunc")


class Value:
    """A tensor or number in registers."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype
        self.type = SimpleNamespace(layout=Layout())

    __add__, __radd__ = operator(lambda a, b: a + b), operator(lambda a, b: a + b, True)
    __sub__, __rsub__ = operator(lambda a, b: a - b), operator(lambda a, b: a - b, True)
    __mul__, __rmul__ = operator(lambda a, b: a * b), operator(lambda a, b: a * b, True)
    __truediv__, __rtruediv__ = operator(lambda a, b: a / b), operator(lambda a, b: a / b, True)
    __floordiv__, __rfloordiv__ = operator(divide), operator(divide, True)
    __mod__ = operator(lambda a, b: torch.fmod(a, torch.as_tensor(b)))
    __and__, __rand__ = operator(lambda a, b: a & b), operator(lambda a, b: a & b, True)
    __or__, __ror__ = operator(lambda a, b: a | b), operator(lambda a, b: a | b, True)
    __xor__ = operator(lambda a, b: a ^ b)
    __rshift__, __lshift__ = operator(lambda a, b: a >> b), operator(lambda a, b: a << b)
    __lt__, __le__ = operator(lambda a, b: a < b), operator(lambda a, b: a <= b)
    __gt__, __ge__ = operator(lambda a, b: a > b), operator(lambda a, b: a >= b)
    __eq__, __ne__ = operator(lambda a, b: a == b), operator(lambda a, b: a != b)  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> "Value":
        return Value(-self.x)

    def __invert__(self) -> "Value":
        return Value(~self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __getitem__(self, at: Any) -> "Value":
        return Value(self.x[at])

    def to(self, kind: torch.dtype, bitcast: bool = False) -> "Value":
        return Value(self.x.view(kind) if bitcast else self.x.to(kind))

    def reshape(self, shape: list[int]) -> "Value":
        return Value(self.x.reshape([int(n) for n in shape]))

    def permute(self, order: tuple[int, ...]) -> "Value":
        return Value(self.x.permute(order))


class Pointer:
    """Places in a tensor, which is flat."""

    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at, self.dtype = base, at, SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.at + plain(other))

    def __sub__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.at - plain(other))

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Where, and which of them count."""
        at = torch.as_tensor(self.at, dtype=torch.int64)
        kept = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(plain(mask))
        at, kept = torch.broadcast_tensors(at, kept)
        inside = (at >= 0) & (at < self.base.numel())
        assert (inside | ~kept).all(), "an access beside the tensor it begins in"
        return at, kept


class Shared:
    """A part of shared memory. unfenced: of each of its bytes the number of the group of warps that has stored it since
    that group's last fence, or 0."""

    def __init__(self, x: Tensor, unfenced: Tensor) -> None:
        self.x, self.unfenced, self.shape, self.dtype = x, unfenced, list(x.shape), x.dtype

    @classmethod
    def new(cls, shape: list[int], kind: torch.dtype) -> "Shared":
        x = torch.zeros(shape, dtype=kind)
        return cls(
            x.fill_(torch.nan) if kind.is_floating_point else x, x.new_zeros(*shape, kind.itemsize, dtype=torch.uint8)
        )

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < self.shape[0], f"buffer {int(i)} of {self.shape[0]}"
        return Shared(self.x[int(i)], self.unfenced[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(*(x.narrow(dim, int(start), int(length)) for x in (self.x, self.unfenced)))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.x.permute(order), self.unfenced.permute(*order, len(order)))

    def _reinterpret(self, kind: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        shape, wide = [int(n) for n in shape], kind.itemsize
        count = wide * prod(shape)
        x, unfenced = self.x.view(-1).view(torch.uint8)[:count], self.unfenced.view(-1)[:count]
        return Shared(x.view(kind).view(shape), unfenced.view(*shape, wide))
