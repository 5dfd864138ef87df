"""The scans of scalar and delta for Hopper, for the commonest heads in 16 bits, in Triton's Gluon.

A program is three groups of warps. One fetches chunks by the tensor-memory accelerator, into a ring of buffers, while
two groups of four warps consume them, each with half of a state in registers. What one group waits for, the other fills
with products. A group issues a chunk's products as soon as their operands are there, and waits for each only when it
reads it.
"""
