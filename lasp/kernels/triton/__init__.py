"""Device kernels, one pipeline step per file, with their launchers.

Three phases serve one rank and many (math §1): `states` walks every tile of tokens for its summary, `scan` passes the
state from tile to tile, and outputs (or gradients) walk the tiles again with the state that enters them in registers.
What a rank tells others comes out of the second phase, and what it is told is added to what enters its tiles (scan).

On Hopper, `hopper/` has the walks for the commonest heads once more, closer to the hardware.

`decode` alone needs none of that: one token, one launch.

Names in kernels: H value heads, G = H // Hq value heads per q/k head, K, V head sizes, BK, BV blocks of them (powers of
two), C tokens per chunk. All tensors are contiguous, tokens are flat ([B·T, H, D]).
"""
