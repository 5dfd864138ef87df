"""What the emulator of kernels finds: each of these is wrong in one way."""

import pytest
import torch

from lasp.kernels.triton.launch import launch

gluon = pytest.importorskip("triton.experimental.gluon")
if torch.cuda.is_available():
    pytest.skip("kernels run there", allow_module_level=True)

from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from lasp.kernels.triton.hopper.layouts import SHARED, mma_layout  # noqa: E402
from lasp.kernels.triton.hopper.products import product  # noqa: E402
from lasp.kernels.triton.hopper.ring import make_ring  # noqa: E402
from lasp.kernels.triton.hopper.shared import blocks_of  # noqa: E402
from lasp.kernels.triton.pdl import griddepcontrol_wait  # noqa: E402
from tests.kernels import emulator  # noqa: E402

SIZE = gl.constexpr(64)


@gluon.jit
def _fetch(x, rows, ring, AWAITED: gl.constexpr):
    for step in range(2 if AWAITED else 3):
        filled = ring.acquire(step)
        mbarrier.expect(filled, 2 * SIZE * SIZE)
        tma.async_copy_global_to_shared(x, [0, 0], filled, rows.index(step % 2))


@gluon.jit
def _compute(x, rows, ring, y, y_rows, WRONG: gl.constexpr):
    LAYOUT: gl.constexpr = mma_layout(SIZE)
    out = gl.allocate_shared_memory(gl.bfloat16, [SIZE, SIZE], SHARED)
    for step in range(3 if WRONG == "waits for ever" else 2):
        ring.wait(step)
        squares = product(rows.index(step), rows.index(step).permute((1, 0)), LAYOUT)
        if WRONG != "uses a product too early":
            squares = warpgroup_mma_wait(0, deps=(squares,))
        if WRONG == "tells too often":
            mbarrier.arrive(ring.empty.index(step), count=2)
        ring.release(step)
        tma.store_wait(0)
        out.store(squares.to(gl.bfloat16))
        if WRONG != "forgets a fence":
            fence_async_shared()
        tma.async_copy_shared_to_global(y_rows, [step * SIZE, 0], out)
        if WRONG == "writes a buffer that has not left":
            out.store(squares.to(gl.bfloat16) * 0.0)
    tma.store_wait(0)
    if WRONG == "writes beside a tensor":
        gl.store(y + 2 * SIZE * SIZE, 0.0)


@gluon.jit
def _kernel(x, y, y_rows, WRONG: gl.constexpr):
    if WRONG != "does not wait for the kernel before":
        griddepcontrol_wait()
    rows = gl.allocate_shared_memory(gl.bfloat16, [2, SIZE, SIZE], SHARED)
    ring = make_ring(2, 1)
    gl.warp_specialize(
        [
            (_compute, (x, rows, ring, y, y_rows, WRONG)),
            (_fetch, (x, rows, ring, WRONG != "leaves while a copy comes")),
        ],
        [1],
        [24],
    )


def squares_of(x: torch.Tensor, wrong: str) -> torch.Tensor:
    y = torch.zeros(1, 128, 1, 64, dtype=torch.bfloat16)
    rows, y_rows = (blocks_of(t, 64, [64, 64]) for t in (x, y))
    for each in ("nothing", wrong):  # the second one comes after a kernel
        launch(_kernel, (1,), rows, y, y_rows, WRONG=each, num_warps=4, pdl=True)
    return y[0, :, 0]


@pytest.fixture
def x(gen, monkeypatch) -> torch.Tensor:
    emulator.install(monkeypatch, seed=int(torch.randint(2**31, (), generator=gen)))
    return torch.randn(1, 64, 1, 64, generator=gen).bfloat16()


def test_what_is_right_is_computed(x):
    rows = x[0, :, 0].float()
    assert torch.equal(squares_of(x, "nothing"), (rows @ rows.T).bfloat16().repeat(2, 1))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("waits for ever", "wait for each other for ever"),
        ("uses a product too early", "has no attribute"),
        ("tells too often", "more arrive at a barrier"),
        ("forgets a fence", "without a fence"),
        ("writes beside a tensor", "beside the tensor"),
        ("leaves while a copy comes", "on its way when its program ends"),
        ("does not wait for the kernel before", "does not wait for the kernel before"),
    ],
)
def test_what_is_wrong_is_told(x, wrong, told):
    with pytest.raises((AssertionError, AttributeError, RuntimeError), match=told):
        squares_of(x, wrong)


def test_what_is_sent_leaves_as_late_as_it_may(x):
    assert not squares_of(x, "writes a buffer that has not left").any()
