"""Barriers, and multistage pipelines: some warps fill a ring of buffers with chunks while others read earlier ones.

A fence follows the making of a barrier, since TMA, which counts what has come on it, goes another way to shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate


@aggregate
class Ring:
    """Who may use which of `stages` buffers, step by step: step i's buffer is number i % stages, used once a round.

    full: [stages, 1] barriers on which readers wait, told by whoever fills. empty: those on which that one waits, told
    by every reader; a barrier's phase is the parity of the round.
    """

    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    stages: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, full, empty, stages):
        self.full = full
        self.empty = empty
        self.stages = gl.constexpr(stages)

    @gluon.jit
    def acquire(self, step):
        """Waits until step's buffer may be written; returns the barrier to be told when it has been."""
        mbarrier.wait(self.empty.index(step % self.stages), (step // self.stages & 1) ^ 1)
        return self.full.index(step % self.stages)

    @gluon.jit
    def fill(self, step):
        """Step's buffer has been written."""
        mbarrier.arrive(self.full.index(step % self.stages), count=1)

    @gluon.jit
    def wait(self, step):
        """Waits until step's buffer may be read."""
        mbarrier.wait(self.full.index(step % self.stages), step // self.stages & 1)

    @gluon.jit
    def release(self, step, pred=True):
        """One reader is done with step's buffer."""
        mbarrier.arrive(self.empty.index(step % self.stages), count=1, pred=pred)


@gluon.jit
def make_barrier():
    """For one load: for those that share one the compiler has all threads meet in between."""
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    return full


@gluon.jit
def make_meeting(GROUPS: gl.constexpr = 2):
    """Where GROUPS groups of warps wait for each other: full at each step that all of them have filled."""
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=GROUPS)
    return Ring(full, full, 1)


@gluon.jit
def make_ring(STAGES: gl.constexpr, READERS: gl.constexpr = 2):
    """One whose buffers READERS groups of warps read."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return Ring(full, empty, STAGES)
