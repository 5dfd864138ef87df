"""What it takes to time other libraries."""

from importlib.util import find_spec

import torch


def allow_wrong_gradients() -> bool:
    """flash-linear-attention refuses versions of Triton that miscompile its gates' backward pass on Hopper GPUs (its
    issue 640), unless tilelang is there. Its speed can be told all the same: True where its gradients are wrong."""
    from fla.ops.common import chunk_o

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    wrong = hopper and not getattr(chunk_o, "TRITON_ABOVE_3_7_1", True) and find_spec("tilelang") is None
    if wrong:
        chunk_o.TRITON_ABOVE_3_7_1 = True
    return wrong
