"""The native combine and the protocol around it, with ranks that are threads."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from shutil import which
from threading import Barrier

import pytest
import torch

from lasp.kernels.summary import Transition
from lasp.parallel import native
from lasp.parallel.combine import Affine
from lasp.parallel.layout import Layout
from tests.patience import PATIENCE

B, HEADS, K, V = 1, 2, 5, 3
TRANSITIONS = {"none": None, "scalar": (HEADS,), "diagonal": (HEADS, K), "matrix": (HEADS, K, K)}
needs_compiler = pytest.mark.skipif(not (which("c++") and which("ninja")), reason="no C++ compiler or no ninja")


class Threads:
    """The ranks of a layout as threads of this process; `calls` is what each of them passes from call to call."""

    def __init__(self, layout: Layout, dtype: torch.dtype, slot_bytes: int, patience: float):
        self.layout, self.dtype, self.slot_bytes, self.patience = layout, dtype, slot_bytes, patience
        self.library = native.load(torch.device("cpu"))
        size = 2 * slot_bytes + 4 * layout.ranks * native.PARTS
        self.buffers = [torch.full((size,), 255, dtype=torch.uint8) for _ in range(layout.ranks)]  # NaN
        for buffer in self.buffers:
            buffer[2 * slot_bytes :] = 0
        self.table = (ctypes.c_void_p * layout.ranks)(*(buffer.data_ptr() for buffer in self.buffers))
        self.locals = torch.zeros(layout.ranks, native.PARTS + 1, dtype=torch.int32)
        self.errors = torch.zeros(layout.ranks, dtype=torch.int32)

    def exchange(
        self,
        rank: int,
        states,
        transitions,
        breaks: tuple[bool, ...],
        backward: bool,
        once_published: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        owned = list(self.layout.owned(rank))
        own, arrived = states[owned].contiguous(), torch.empty_like(states[owned])
        a = None if transitions is None else transitions[owned].contiguous()
        first = self.layout.units - 1 if backward else 0
        kind = native.Shape(B * HEADS, *states.shape[3:], Transition.of(a, states))
        assert self.layout.units * kind.unit_bytes(self.dtype.itemsize) <= self.slot_bytes
        channel = native.Channel(
            buffers=ctypes.addressof(self.table),
            local=self.locals[rank].data_ptr(),
            error=self.errors[rank:].data_ptr(),
            slot_bytes=self.slot_bytes,
            patience_ns=int(self.patience * 1e9),
            rank=rank,
            layout=native.Layout(self.layout.ranks, self.layout.units_per_rank),
            shape=kind,
            backward=backward,
            reach=native.Pair(*(Affine(breaks, backward).reach(unit) for unit in owned)),
            spread=native.Pair(*(Affine(breaks, not backward).reach(unit) for unit in owned)),
            passes=native.Pair(*(unit != first and not breaks[unit] for unit in owned)),
        )
        call, doubles = ctypes.byref(channel), self.dtype == torch.float64
        sent = None if a is None else a.data_ptr()
        assert self.library.lasp_publish(call, doubles, own.data_ptr(), sent, None) == 0
        once_published()
        assert self.library.lasp_collect(call, doubles, arrived.data_ptr(), None) == 0
        return arrived


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_native_combine_equals_the_python_one(gen: torch.Generator, name: str, dtype: torch.dtype):
    """Many calls in a row, of ranks that are threads: slots are reused while others may still be reading."""
    layout, calls = Layout(name, 4), []
    for kind in range(24):
        shape = list(TRANSITIONS.values())[kind % 4]
        states = torch.randn(layout.units, B, HEADS, K, V, generator=gen, dtype=dtype)
        transitions = None
        if shape is not None:
            transitions = torch.randn(layout.units, B, *shape, generator=gen, dtype=dtype) / 2
            transitions = -transitions.abs() if len(shape) < 3 else transitions
        breaks = tuple((torch.rand(layout.units, generator=gen) < 0.2).tolist())
        calls.append((states, transitions, breaks, bool(kind // 4 % 2)))
    ranks = Threads(layout, dtype, slot_bytes=8192, patience=PATIENCE)

    def work(rank: int) -> list[torch.Tensor]:
        return [ranks.exchange(rank, *call) for call in calls]

    with ThreadPoolExecutor(layout.ranks) as pool:
        found = list(pool.map(work, range(layout.ranks)))
    for number, (states, transitions, breaks, backward) in enumerate(calls):
        for rank in range(layout.ranks):
            algebra = Affine(breaks, backward)
            wanted = algebra.combine(states, algebra.factors_of(transitions, states), layout.owned(rank))
            torch.testing.assert_close(found[rank][number], wanted, rtol=0, atol=1000 * torch.finfo(dtype).eps)
    assert not ranks.errors.any()


@needs_compiler
def test_a_rank_that_does_not_come_is_named(gen: torch.Generator):
    layout = Layout("contiguous", 3)
    ranks = Threads(layout, torch.float32, slot_bytes=1024, patience=0.2)
    states = torch.randn(layout.units, B, HEADS, K, V, generator=gen)
    both = Barrier(2)

    def work(rank: int) -> torch.Tensor:
        return ranks.exchange(rank, states, None, (False,) * 3, False, both.wait)

    with ThreadPoolExecutor(2) as pool:
        arrived = list(pool.map(work, (0, 1)))
    assert ranks.errors.tolist() == [3, 3, 0]  # 1 + the rank
    assert all(x.isnan().all() for x in arrived)
    later = ranks.exchange(0, states, None, (False,) * 3, False)
    assert later.isnan().all()
