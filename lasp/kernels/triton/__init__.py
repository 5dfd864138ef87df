"""Device kernels, one pipeline step per file, with their launchers, in a package for each class of operations:

    scalar             linear attention without decay, with a constant one or a scalar gate
    diagonal           linear attention with a vector gate
    delta              the delta rule with any of these
    log_linear         log-linear attention with a scalar gate
    log_linear_delta   the same with the delta rule
    hopper             the scans of scalar, diagonal and delta once more, closer to the hardware, for the commonest
                       heads on Hopper
    shared             what several of them use
    decode             one token in one launch, of any operation but the log-linear ones (log_linear.step)

Three phases serve one rank and many (math §1): every tile of tokens is scanned for its summary, the state is passed
from tile to tile (shared.state_passing), and another scan finds outputs (or gradients) with each tile's initial state
in registers. What a rank tells others comes out of the second phase, and what it is told is added to its tiles' initial
states.

Names in kernels: H value heads, G = H // Hq value heads per q/k head, K, V head sizes, BK, BV blocks of them (powers of
two), C tokens per chunk, M tiles, N segments. All tensors are contiguous, tokens are flat ([B·T, H, D]). Logarithms of
decays are natural (`ln_`) in arguments and between tiles, and binary (`log2_`) where a chunk's weights are computed.
"""
