"""Kernels for Hopper, for the commonest heads in 16 bits, in Triton's Gluon: the scans of scalar, delta and diagonal,
and what comes before and after those with a vector gate, a program for each chunk.

A scan's program is three groups of warps. One fetches chunks by the tensor-memory accelerator, into a ring of buffers,
while two groups of four warps consume them, each with half of a state in registers. What one group waits for, the other
fills with products. A group issues a chunk's products as soon as their operands are there, and waits for each only when
it reads it.

What groups of warps get are named tuples: which tokens (tiles), rows of chunks where they come from and where in shared
memory they lie (tiles, delta_rows), what is read and written besides. They wait for each other at the barriers of ring
alone, and multiply by products alone.
"""
