"""Kernels in Triton and Gluon, run by Python on PyTorch's tensors, in any dtype and without a GPU: what they compute,
and who waits for whom. `install` has launches run so.

A program's groups of warps are threads, of which one runs at a time; at every barrier another one may go on, drawn at
random. What is asynchronous happens as late as it may: products and copies by TMA when somebody waits for them. So a
buffer that is written or handed on too early shows in the result. These are errors:

    groups of warps that wait for each other for ever, and more arrivals at a barrier than it expects
    accesses beside a tensor or a buffer
    results of products that nobody has waited for
    what is stored in shared memory and read by products or TMA without a fence between
    copies that nobody has waited for when their program ends
    what the kernel before has to do with, touched before that has been waited for (lasp.kernels.triton.pdl)

Layouts are not looked at: the compiler checks them. One warp does not run ahead of another of its group.
"""

from tests.kernels.emulator.launch import install

__all__ = ["install"]
