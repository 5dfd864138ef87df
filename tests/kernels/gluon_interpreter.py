"""Kernels in Gluon, run by Python on PyTorch's tensors: what they compute, and who waits for whom, without a GPU.

A program's groups of warps are threads, of which one runs at a time: at every barrier another may go on, drawn at random.
So a buffer that is written too early shows in the result, and who would wait for ever is told. Layouts are taken as they
are, the compiler checks them; fences and the memory's own delays are not seen. Accesses that their mask does not keep
within their tensor fail, and TMA writes what is sent only when its sender waits for it, or ends.
"""

import random
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language.core import constexpr, dtype
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}


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
    """Places in a tensor."""

    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at, self.dtype = base, at, SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.at + plain(other))

    def __sub__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.at - plain(other))

    def kept(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Where, and which of it."""
        at = torch.as_tensor(self.at, dtype=torch.int64)
        keep = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(plain(mask))
        at, keep = torch.broadcast_tensors(at, keep)
        places = at[keep]
        assert ((places >= 0) & (places < self.base.numel())).all(), "an access beside the tensor it begins in"
        return at, keep


class Shared:
    """A part of shared memory."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < self.shape[0], f"buffer {int(i)} of {self.shape[0]}"
        return Shared(self.x[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.x.narrow(dim, int(start), int(length)))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.x.permute(order))

    def _reinterpret(self, kind: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        count = int(torch.tensor([int(n) for n in shape]).prod()) * kind.itemsize
        return Shared(self.x.flatten().view(torch.uint8)[:count].view(kind).view([int(n) for n in shape]))

    def load(self, layout: Any = None) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        assert value.dtype == self.dtype and list(value.shape) == self.shape, (value.dtype, value.shape, self.shape)
        self.x.copy_(value.x)


class Barrier:
    """An mbarrier."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0

    def arrive(self, count: int) -> None:
        assert self.pending >= count, "more arrive at a barrier than are expected"
        self.pending -= count
        self.settle()

    def come(self, count: int) -> None:
        self.bytes -= count
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class Program:
    """One program, whose groups of warps take turns."""

    def __init__(self, number: tuple[int, ...], grid: tuple[int, ...], warps: int, seed: int) -> None:
        self.number, self.grid, self.random = number, grid, random.Random(seed)
        self.barriers: dict[int, Barrier] = {}
        self.memory: list[Tensor] = []  # whose addresses are not to come again
        self.turn = threading.Condition()
        self.waiting: dict[int, Callable[[], bool]] = {0: lambda: True}  # groups that are not done
        self.running, self.failed = 0, False
        self.group = threading.local()
        self.start_group(0, warps)

    def start_group(self, name: int, warps: int) -> None:
        self.group.name, self.group.warps, self.group.sent = name, warps, []

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Somebody who can goes on; returns when this group is to."""
        name = self.group.name
        self.waiting[name] = until
        self.hand_over()
        self.await_turn(name)

    def hand_over(self) -> None:
        able = [name for name, until in self.waiting.items() if until()]
        with self.turn:
            if not able and self.waiting:
                self.failed = True
            self.running = self.random.choice(able) if able else -1
            self.turn.notify_all()

    def await_turn(self, name: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.running == name or self.failed)
        if self.failed:
            raise RuntimeError("all groups of warps wait for each other, or one failed")

    def specialize(self, groups: list[tuple[Callable[..., None], tuple]], warps: list[int]) -> None:
        errors: list[BaseException] = []

        def work(name: int, function: Callable[..., None], args: tuple, warps: int) -> None:
            try:
                self.start_group(name, warps)
                self.await_turn(name)
                with torch.no_grad():
                    function(*args)
                    self.send(0)
            except BaseException as error:
                errors.append(error)
                self.failed = True
            del self.waiting[name]
            self.hand_over()

        sizes = [self.group.warps, *warps]
        self.waiting = {name: lambda: True for name in range(1, len(groups) + 1)}
        self.running = -1
        threads = [
            threading.Thread(target=work, args=(n + 1, *group, size))
            for n, (group, size) in enumerate(zip(groups, sizes, strict=True))
        ]
        for thread in threads:
            thread.start()
        self.hand_over()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def send(self, left: int) -> None:
        """All that this group has sent but the last so many has been read."""
        sent = self.group.sent
        while len(sent) > left:
            sent.pop(0)()


current: Program


def barrier_at(place: Shared) -> Barrier:
    return current.barriers[place.x.data_ptr()]


class mbarrier:
    MBarrierLayout = Layout

    @staticmethod
    def init(place: Shared, count: int) -> None:
        current.barriers[place.x.data_ptr()] = Barrier(int(count))

    @staticmethod
    def arrive(place: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier_at(place).arrive(int(count))
        current.pause()

    @staticmethod
    def expect(place: Shared, count: Any, pred: Any = True) -> None:
        barrier = barrier_at(place)
        barrier.bytes += int(count)
        barrier.arrive(1)

    @staticmethod
    def wait(place: Shared, phase: Any) -> None:
        barrier, phase = barrier_at(place), int(phase)
        current.pause(lambda: barrier.phase != phase)


class Descriptor:
    """How blocks of a tensor of two dimensions come and go."""

    def __init__(self, given: Any) -> None:
        (self.rows, self.columns), self.block, self.dtype = given.shape, given.block_shape, given.base.dtype
        assert list(given.strides) == [self.columns, 1] and given.base.is_contiguous()
        self.x = given.base.view(self.rows, self.columns)

    def overlap(self, at: list[Any]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Of the block from there on: what lies in the tensor, there and in the block."""
        (row, column), (height, width) = (int(n) for n in at), self.block
        assert row >= 0 and 0 <= column <= self.columns - width, (row, column)
        rows = max(0, min(height, self.rows - row))
        return (slice(row, row + rows), slice(column, column + width)), (slice(0, rows), slice(0, width))


class tma:
    @staticmethod
    def async_copy_global_to_shared(source: Descriptor, at: list[Any], barrier: Shared, target: Shared) -> None:
        assert target.shape == list(source.block) and target.dtype == source.dtype
        there, here = source.overlap(at)
        target.x.zero_()
        target.x[here] = source.x[there]
        barrier_at(barrier).come(target.x.numel() * target.dtype.itemsize)

    @staticmethod
    def async_copy_shared_to_global(target: Descriptor, at: list[Any], source: Shared) -> None:
        assert source.shape == list(target.block) and source.dtype == target.dtype
        there, here = target.overlap(at)
        current.group.sent.append(lambda: target.x[there].copy_(source.x[here]))

    @staticmethod
    def store_wait(pendings: int) -> None:
        current.send(int(pendings))


class async_copy:
    @staticmethod
    def async_copy_global_to_shared(target: Shared, source: Pointer) -> None:
        target.store(language.load(source))

    @staticmethod
    def mbarrier_arrive(place: Shared) -> None:
        """It waits for copies, which are done, and counts for nothing."""


def multiply(a: Any, b: Any, acc: Value, use_acc: Any = True, is_async: bool = False) -> Value:
    y = a.x.float() @ b.x.float()
    return Value(acc.x + y if use_acc else y)


def wait_for_products(_: int, deps: tuple[Value, ...]) -> Any:
    return deps[0] if len(deps) == 1 else deps


def unary(compute: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    return lambda x: Value(compute(torch.as_tensor(plain(x))))


def both(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Value]:
    def apply(a: Any, b: Any) -> Value:
        a, b = torch.as_tensor(plain(a)), torch.as_tensor(plain(b))
        return Value(compute(a, b.to(a.dtype) if b.ndim == 0 and a.ndim else b))

    return apply


class language:
    """gl, and what of tl is used of it."""

    float16, bfloat16, float32, float64, int32, int64 = DTYPES.values()
    constexpr = staticmethod(lambda x: x)
    static_range = range
    SliceLayout = BlockedLayout = DotOperandLayout = NVMMADistributedLayout = Layout
    SwizzledSharedLayout = NVMMASharedLayout = Layout
    exp, exp2, log2, abs, floor = map(unary, (torch.exp, torch.exp2, torch.log2, torch.abs, torch.floor))
    minimum, maximum = both(torch.minimum), both(torch.maximum)

    @staticmethod
    def program_id(axis: int) -> Value:
        return Value(torch.tensor(current.number[axis], dtype=torch.int32))

    @staticmethod
    def num_programs(axis: int) -> Value:
        return Value(torch.tensor(current.grid[axis], dtype=torch.int32))

    @staticmethod
    def num_warps() -> int:
        return current.group.warps

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return (a + (b - 1)) // b

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def zeros(shape: list[int], kind: torch.dtype, layout: Any = None) -> Value:
        return Value(torch.zeros([int(n) for n in shape], dtype=kind))

    @staticmethod
    def full(shape: list[int], value: Any, kind: torch.dtype, layout: Any = None) -> Value:
        return Value(torch.zeros([int(n) for n in shape], dtype=kind) + torch.as_tensor(plain(value)).to(kind))

    @staticmethod
    def zeros_like(x: Value) -> Value:
        return Value(torch.zeros_like(x.x))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Value:
        return Value(torch.where(torch.as_tensor(plain(condition)), plain(a), plain(b)))

    @staticmethod
    def sum(x: Value, axis: int | None = None) -> Value:
        return Value(x.x.sum(axis, dtype=x.dtype if x.dtype.is_floating_point else None))

    @staticmethod
    def max(x: Value, axis: int | None = None) -> Value:
        return Value(x.x.max() if axis is None else x.x.amax(axis))

    @staticmethod
    def cumsum(x: Value, axis: int, reverse: bool = False) -> Value:
        return Value(x.x.flip(axis).cumsum(axis).flip(axis) if reverse else x.x.cumsum(axis))

    @staticmethod
    def dot(a: Value, b: Value, acc: Value | None = None, input_precision: str = "") -> Value:
        y = a.x.float() @ b.x.float()
        return Value(y if acc is None else acc.x + y)

    @staticmethod
    def trans(x: Value) -> Value:
        return Value(x.x.mT)

    @staticmethod
    def reshape(x: Value, *shape: Any) -> Value:
        return x.reshape(shape[0] if isinstance(shape[0], (list, tuple)) else shape)

    @staticmethod
    def range(*ends: Any, num_stages: int = 1) -> Any:
        return range(*(int(end) for end in ends))

    @staticmethod
    def debug_barrier() -> None:
        pass

    @staticmethod
    def reduce(x: Value, axis: int, combine: Callable[[Value, Value], Value]) -> Value:
        parts = [Value(part) for part in x.x.unbind(axis)]
        total = parts[0]
        for part in parts[1:]:
            total = combine(total, part)
        return total

    @staticmethod
    def associative_scan(
        x: Value, axis: int, combine: Callable[[Value, Value], Value], reverse: bool = False
    ) -> Value:
        parts = [Value(part) for part in x.x.unbind(axis)]
        parts = parts[::-1] if reverse else parts
        for n in range(1, len(parts)):
            parts[n] = combine(parts[n - 1], parts[n])
        return Value(torch.stack([part.x for part in (parts[::-1] if reverse else parts)], axis))

    @staticmethod
    def convert_layout(x: Value, layout: Any) -> Value:
        return x

    @staticmethod
    def load(place: Pointer, mask: Any = None, other: Any = 0.0, volatile: bool = False) -> Value:
        at, keep = place.kept(mask)
        found = torch.as_tensor(plain(other)).to(place.base.dtype).expand(at.shape).clone()
        found[keep] = place.base[at[keep]]
        return Value(found)

    @staticmethod
    def store(place: Pointer, value: Any, mask: Any = None) -> None:
        at, keep = place.kept(mask)
        value = torch.as_tensor(plain(value)).to(place.base.dtype).expand(at.shape)
        place.base[at[keep]] = value[keep]

    @staticmethod
    def atomic_add(place: Pointer, value: Value, mask: Any = None, sem: str = "") -> None:
        at, keep = place.kept(mask)
        place.base.index_put_((at[keep],), value.x.expand(at.shape)[keep], accumulate=True)

    @staticmethod
    def allocate_shared_memory(kind: torch.dtype, shape: list[int], layout: Any) -> Shared:
        shape = [int(n) for n in shape]
        rubbish = torch.full(shape, torch.nan, dtype=kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
        current.memory.append(rubbish)
        return Shared(rubbish)

    @staticmethod
    def warp_specialize(groups: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: Any) -> None:
        current.specialize(groups, [int(n) for n in warps])

    @staticmethod
    def inline_asm_elementwise(
        asm: str, constraints: str, args: list[Value], kinds: Any, is_pure: bool, pack: int
    ) -> Any:
        (x,) = args
        if asm.startswith("ex2"):
            return Value(torch.exp2(x.x))
        assert "cvt.rn.bf16x2" in asm, asm
        high = x.x.bfloat16()
        return Value(high), Value((x.x - high.float()).bfloat16())


BY_NAME = {
    "gl": language, "tl": language, "tma": tma, "mbarrier": mbarrier, "async_copy": async_copy,
    "warpgroup_mma": multiply, "warpgroup_mma_wait": wait_for_products, "mma_v2": multiply,
    "barrier": lambda: None, "fence_async_shared": lambda: None, "griddepcontrol_wait": lambda: None,
}  # fmt: skip
rebuilt: dict[int, Any] = {}


def translated(name: str, x: Any) -> Any:
    """What stands for something that a kernel finds among its module's names."""
    if name in BY_NAME:
        return BY_NAME[name]
    if isinstance(x, constexpr):
        return translated(name, x.value)
    if isinstance(x, dtype):
        return DTYPES[x.name.replace("fp", "float").replace("bf16", "bfloat16")]
    if isinstance(x, (GluonJITFunction, JITFunction, InterpretedFunction, ConstexprFunction)):
        return rebuild(x.fn)
    if isinstance(x, type) and getattr(x, "__triton_aggregate__", False):
        return struct(x)
    if type(x).__name__.endswith("Layout"):
        return Layout()
    return x


def rebuild(function: Any) -> Callable[..., Any]:
    """The function among translated names."""
    if id(function) not in rebuilt:
        names: dict[str, Any] = {}
        given = tuple(translated("", x) for x in function.__defaults__ or ())
        made = FunctionType(function.__code__, names, function.__name__, given, function.__closure__)
        rebuilt[id(function)] = made
        used = set(function.__code__.co_names)
        names |= {name: translated(name, x) for name, x in function.__globals__.items() if name in used}
    return rebuilt[id(function)]


def struct(kind: type) -> type:
    """An aggregate."""
    if id(kind) not in rebuilt:
        methods = {n: rebuild(x.fn) for n, x in vars(kind).items() if isinstance(x, (GluonJITFunction, JITFunction))}
        rebuilt[id(kind)] = type(kind.__name__, (), methods | {"__init__": rebuild(kind.hash_attrs[0].fn)})
    return rebuilt[id(kind)]


def argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.detach().view(-1))
    if isinstance(x, (int, float)):
        return Value(torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int32))
    return Descriptor(x) if hasattr(x, "block_shape") else x


@torch.no_grad()
def run(kernel: GluonJITFunction, grid: tuple[int, ...], seed: int, args: tuple, constants: dict[str, Any]) -> None:
    """kernel[grid](*args, **constants), program after program."""
    global current
    constants = {name: translated("", x) for name, x in constants.items() if name != "maxnreg"}
    constants.pop("num_stages", None)
    warps, function, given = constants.pop("num_warps"), rebuild(kernel.fn), [argument(x) for x in args]
    for n in range(int(torch.tensor(grid).prod())):
        number, left = [], n
        for size in (*grid, 1, 1)[:3]:
            number.append(left % size)
            left //= size
        current = Program(tuple(number), (*grid, 1, 1)[:3], warps, seed + n)
        function(*given, **constants)
        current.send(0)
