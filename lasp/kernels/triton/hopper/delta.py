"""What the walks of the delta rule share (delta_up, delta_down)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from lasp.kernels.triton.hopper.shared import HALF, LINE, SIZE, C


@gluon.jit
def fetch(q, k, v, wy, scores, buffers, full, empty, begin, count, h, G, UP: gl.constexpr, BYTES: gl.constexpr):
    """Chunks of k and T, and of what else there is, in the order of a walk up or down."""
    q_rows, k_rows, v_rows, wy_rows, scores_rows = buffers
    STAGES: gl.constexpr = full.shape[0]
    chunks = gl.cdiv(count, C)
    for step in range(chunks):
        row = begin.to(gl.int32) + (step if UP else chunks - 1 - step) * C
        stage = step % STAGES
        filled = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(filled, BYTES)
        tma.async_copy_global_to_shared(k, [row, h // G * SIZE], filled, k_rows.index(stage))
        tma.async_copy_global_to_shared(wy, [row, h * C], filled, wy_rows.index(stage))
        if v is not None:
            tma.async_copy_global_to_shared(v, [row, h * SIZE], filled, v_rows.index(2 * stage))
            tma.async_copy_global_to_shared(v, [row, h * SIZE + HALF], filled, v_rows.index(2 * stage + 1))
        if q is not None:
            tma.async_copy_global_to_shared(q, [row, h // G * SIZE], filled, q_rows.index(stage))
        if scores is not None:
            tma.async_copy_global_to_shared(scores, [row, h * C], filled, scores_rows.index(stage))


@gluon.jit
def load_line(gates, chunk, h, H, WHICH: gl.constexpr):
    """One of beta, b, e^b and e^{b_C - b} of a chunk, [C]."""
    return gl.load(gates + ((chunk * H + h) * 4 + WHICH) * C + gl.arange(0, C, layout=LINE))


@gluon.jit
def load_gates(gates, chunk, h, H):
    """b, e^b and e^{b_C - b}"""
    return load_line(gates, chunk, h, H, 1), load_line(gates, chunk, h, H, 2), load_line(gates, chunk, h, H, 3)


@gluon.jit
def load_total(gates, chunk, h, H):
    """e^{b_C}"""
    return gl.load(gates + (chunk * H + h) * 4 * C + 3 * C - 1)
