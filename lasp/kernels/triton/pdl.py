"""How a kernel begins while the one before it ends: programmatic dependent launch, from Hopper on; elsewhere nothing.

A kernel launched so starts when every program of the one before has ended, or has let the next one begin, and there is
room on a multiprocessor. Two rules make that safe, however long the chain of such kernels:

- It calls `griddepcontrol_wait` before it touches what the kernel before has written, or writes what that reads. One
  that has nothing to do with the kernel before does so before it ends, so that who waits for it waits for both: what
  backward begins with once the summaries are on their way, so that it need not wait until they have been sent.
- It lets the next one begin only when it has waited itself, so that all but the kernel before is done when one begins.

Only the exchange (csrc/device.h) lets the next one begin before its end: programs that come early share the
multiprocessors that happen to be free, and kernels made for one program on each took up to 1.5 times as long.
"""

import triton
import triton.language as tl


@triton.jit
def griddepcontrol_wait():
    """Waits until the kernel before has ended, and what it has written is there."""
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
