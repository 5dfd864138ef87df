"""A program: its groups of warps, the order in which they go on, and what they wait for."""

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.emulator.values import Shared, Value


class Barrier:
    """An mbarrier. round: how often it has been full."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.round = 0
        self.filled: set[int] = set()  # rounds in which copies come
        self.seen: set[int] = set()  # those that somebody has waited for

    def arrive(self, count: int) -> None:
        assert self.pending >= count, "more arrive at a barrier than it expects"
        self.pending -= count
        self._settle()

    def expect(self, count: int) -> None:
        self.bytes += count
        self.arrive(1)

    def come(self, count: int) -> None:
        self.filled.add(self.round)
        self.bytes -= count
        self._settle()

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.round = self.count, self.round + 1


class Product:
    """y + a b, on its way; y may be another one."""

    def __init__(self, a: Value | Shared, b: Shared, y: "Value | Product | None") -> None:
        self.a, self.b, self.y, self.result = a, b, y, None
        self.shape, self.type = [a.shape[0], b.shape[1]], Value(torch.zeros(())).type

    def finish(self) -> None:
        for operand in (self.a, self.b):
            if isinstance(operand, Shared):
                require_fence(operand)
        y = self.a.x.float() @ self.b.x.float()
        before = self.y.result if isinstance(self.y, Product) else self.y
        self.result: Value | None = Value(y if before is None else before.x + y)


def require_fence(x: Shared) -> None:
    assert not x.unfenced.any(), "it is read by TMA or products without a fence since it was stored"


class Group:
    """A group of warps. waited: for the kernel before."""

    def __init__(self, number: int, warps: int, waited: bool) -> None:
        self.number, self.warps, self.waited = number, warps, waited
        self.sent: deque[Callable[[], None]] = deque()  # copies from shared memory
        self.products: deque[Product] = deque()

    def send(self, left: int) -> None:
        """All copies but the last so many have read what they copy."""
        while len(self.sent) > left:
            self.sent.popleft()()

    def multiply(self, left: int) -> None:
        """All products but the last so many are done."""
        while len(self.products) > left:
            self.products.popleft().finish()


class Program:
    """touched: what the kernel before has read and written, none of which may be touched before it has been waited for;
    None where it has ended before."""

    def __init__(
        self, number: tuple[int, ...], grid: tuple[int, ...], warps: int, seed: int, touched: tuple[set, set] | None
    ) -> None:
        self.number, self.grid, self.random = number, grid, random.Random(seed)
        self.before, self.read, self.written = touched or (set(), set()), set[int](), set[int]()
        self.barriers: dict[int, Barrier] = {}
        self.memory: list[Shared] = []
        self._turn = threading.Condition()
        self._waiting: dict[int, Callable[[], bool]] = {}  # the groups that are not done, and what for
        self._running, self._failed = 0, False
        self._local = threading.local()
        self._local.group = self.all = Group(1, warps, touched is None)
        self.waited = touched is None

    @property
    def group(self) -> Group:
        """The one that runs."""
        return self._local.group

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Somebody who can goes on; returns when this group does."""
        if self._waiting:
            self._waiting[self.group.number] = until
            self._hand_over()
            self._await_turn()
        else:
            assert until(), "it waits for itself"

    def specialize(self, works: list[tuple[Callable[..., None], tuple]], warps: list[int]) -> None:
        """Each in a group of its own."""
        groups = [Group(n + 1, size, self.group.waited) for n, size in enumerate([self.group.warps, *warps])]
        errors: list[BaseException] = []

        def work(group: Group, function: Callable[..., None], args: tuple) -> None:
            self._local.group = group
            try:
                self._await_turn()
                with torch.no_grad():
                    function(*args)
                self.end()
            except BaseException as error:
                errors.append(error)
                self._failed = True
            del self._waiting[group.number]
            self._hand_over()

        self._waiting = {group.number: lambda: True for group in groups}
        self._running = 0
        threads = [threading.Thread(target=work, args=(g, *w)) for g, w in zip(groups, works, strict=True)]
        for thread in threads:
            thread.start()
        self._hand_over()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def end(self) -> None:
        """A group is done."""
        assert not self.group.products, "nobody has waited for a product"
        self.group.send(0)

    def fence(self) -> None:
        for part in self.memory:
            part.unfenced[part.unfenced == self.group.number] = 0

    def wait_for_kernel(self) -> None:
        self.group.waited = self.waited = True

    def touch(self, x: Tensor, writes: bool) -> None:
        place, (read, written) = x.untyped_storage().data_ptr(), self.before
        if not self.group.waited:
            assert place not in written and not (writes and place in read), "it does not wait for the kernel before"
        (self.written if writes else self.read).add(place)

    def _hand_over(self) -> None:
        able = [number for number, until in self._waiting.items() if until()]
        with self._turn:
            self._failed |= not able and bool(self._waiting)
            self._running = self.random.choice(able) if able else 0
            self._turn.notify_all()

    def _await_turn(self) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._failed or self._running == self.group.number)
        if self._failed:
            raise RuntimeError("groups of warps wait for each other for ever, or another one failed")


_current: list[Program] = []


def current() -> Program:
    return _current[-1]


def run(program: Program, function: Callable[..., None], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    _current[:] = [program]
    with torch.no_grad():
        function(*args, **constants)
    program.end()
    assert program.waited, "it ends without having waited for the kernel before"
    for barrier in program.barriers.values():
        assert barrier.filled <= barrier.seen and barrier.bytes == 0, "a copy is on its way when its program ends"
