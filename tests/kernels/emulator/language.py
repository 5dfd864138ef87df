"""The languages of kernels, `gl` and what of `tl` they use, and the modules that Gluon has for Hopper."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.emulator.program import Barrier, Product, current, require_fence
from tests.kernels.emulator.values import Layout, Pointer, Shared, Value, plain

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64")}


def _barrier(place: Shared) -> Barrier:
    return current().barriers[place.x.data_ptr()]


class mbarrier:
    MBarrierLayout = Layout

    @staticmethod
    def init(place: Shared, count: int) -> None:
        current().barriers[place.x.data_ptr()] = Barrier(int(count))

    @staticmethod
    def arrive(place: Shared, count: int = 1, pred: Any = True) -> None:
        if pred:
            _barrier(place).arrive(int(count))
        current().pause()

    @staticmethod
    def expect(place: Shared, count: Any) -> None:
        _barrier(place).expect(int(count))

    @staticmethod
    def wait(place: Shared, phase: Any) -> None:
        barrier, phase = _barrier(place), int(phase)
        current().pause(lambda: barrier.round % 2 != phase)
        barrier.seen.add(barrier.round - 1)


class Descriptor:
    """How blocks of a tensor of two dimensions come and go."""

    def __init__(self, given: Any) -> None:
        (self.rows, self.columns), self.block, self.dtype = given.shape, list(given.block_shape), given.base.dtype
        assert list(given.strides) == [self.columns, 1] and given.base.is_contiguous()
        self.x = given.base.view(self.rows, self.columns)

    def overlap(self, at: list[Any]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Of the block from there on: what lies in the tensor, there and in the block."""
        (row, column), (height, width) = (int(n) for n in at), self.block
        assert row >= 0 and 0 <= column <= self.columns - width, "a copy beside its tensor"
        rows = max(0, min(height, self.rows - row))
        return (slice(row, row + rows), slice(column, column + width)), (slice(0, rows), slice(0, width))


class tma:
    @staticmethod
    def async_copy_global_to_shared(source: Descriptor, at: list[Any], barrier: Shared, target: Shared) -> None:
        assert target.shape == source.block and target.dtype == source.dtype
        current().touch(source.x, writes=False)
        there, here = source.overlap(at)
        target.unfenced.zero_()
        target.x.zero_()
        target.x[here] = source.x[there]
        _barrier(barrier).come(target.x.numel() * target.dtype.itemsize)

    @staticmethod
    def async_copy_shared_to_global(target: Descriptor, at: list[Any], source: Shared) -> None:
        assert source.shape == target.block and source.dtype == target.dtype
        require_fence(source)
        current().touch(target.x, writes=True)
        there, here = target.overlap(at)
        current().group.sent.append(lambda: target.x[there].copy_(source.x[here]))

    @staticmethod
    def store_wait(pendings: int) -> None:
        current().group.send(int(pendings))


class async_copy:
    @staticmethod
    def async_copy_global_to_shared(target: Shared, source: Pointer) -> None:
        store(target, language.load(source))

    @staticmethod
    def mbarrier_arrive(place: Shared) -> None:
        """It waits for those copies, which are done, and counts for nothing."""


def store(target: Shared, value: Value) -> None:
    assert value.dtype == target.dtype and list(value.shape) == target.shape, (value.dtype, value.shape, target.shape)
    target.x.copy_(value.x)
    target.unfenced.fill_(current().group.number)


def warpgroup_mma(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = True) -> Product:
    current().group.products.append(product := Product(a, b, acc if use_acc else None))
    return product


def warpgroup_mma_wait(num_outstanding: int, deps: tuple[Any, ...]) -> Any:
    current().group.multiply(int(num_outstanding))
    done = [x.result if isinstance(x, Product) and x.result is not None else x for x in deps]
    return done[0] if len(done) == 1 else done


def mma_v2(a: Value, b: Value, acc: Value) -> Value:
    return Value(acc.x + a.x.float() @ b.x.float())


def _unary(compute: Callable[[Tensor], Tensor]) -> Callable[[Any], Value]:
    return lambda x: Value(compute(torch.as_tensor(plain(x))))


def _both(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Value]:
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
    exp, exp2, log2, abs, floor = map(_unary, (torch.exp, torch.exp2, torch.log2, torch.abs, torch.floor))
    minimum, maximum = _both(torch.minimum), _both(torch.maximum)

    @staticmethod
    def program_id(axis: int) -> Value:
        return Value(torch.tensor(current().number[axis], dtype=torch.int32))

    @staticmethod
    def num_programs(axis: int) -> Value:
        return Value(torch.tensor(current().grid[axis], dtype=torch.int32))

    @staticmethod
    def num_warps() -> int:
        return current().group.warps

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
    def associative_scan(x: Value, axis: int, combine: Callable[[Value, Value], Value], reverse: bool = False) -> Value:
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
        at, kept = place.places(mask)
        current().touch(place.base, writes=False)
        found = torch.as_tensor(plain(other)).to(place.base.dtype).expand(at.shape).clone()
        found[kept] = place.base[at[kept]]
        return Value(found)

    @staticmethod
    def store(place: Pointer, value: Any, mask: Any = None) -> None:
        at, kept = place.places(mask)
        current().touch(place.base, writes=True)
        place.base[at[kept]] = torch.as_tensor(plain(value)).to(place.base.dtype).expand(at.shape)[kept]

    @staticmethod
    def atomic_add(place: Pointer, value: Value, mask: Any = None, sem: str = "") -> None:
        at, kept = place.places(mask)
        current().touch(place.base, writes=True)
        place.base.index_put_((at[kept],), value.x.expand(at.shape)[kept], accumulate=True)

    @staticmethod
    def allocate_shared_memory(kind: torch.dtype, shape: list[int], layout: Any) -> Shared:
        current().memory.append(part := Shared.new([int(n) for n in shape], kind))
        return part

    @staticmethod
    def warp_specialize(groups: list[tuple[Callable[..., None], tuple]], warps: list[int], registers: Any) -> None:
        current().specialize(groups, [int(n) for n in warps])

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
