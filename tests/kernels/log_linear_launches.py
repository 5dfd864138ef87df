"""Which kernels log-linear attention would compile on a GPU as lengths and documents change, told without one:

python -m tests.kernels.log_linear_launches        a line of JSON for each call: those that none before it needed
"""

import json
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from tests.kernels.hopper_launches import name_of, pretend_there_is_a_gpu
from tests.kernels.log_linear import draw, inputs

CALLS = [  # tokens, offsets of documents, and what each has had before
    (4096, None, [0]),
    (1500, [0, 1, 1, 730, 1500], [300, 12, 1000, 64]),
    (3079, [0, 500, 3079], [16, 5]),
    (16, None, [1]),
    (1, None, [31]),
]


def new_kernels(delta: bool) -> list[list[str]]:
    """For each of the calls."""
    from lasp.kernels.triton import dispatch, launch
    from lasp.kernels.triton.log_linear.op import TritonLogLinear
    from lasp.kernels.triton.log_linear_delta.op import TritonLogLinearDelta

    seen: set[str] = set()
    new: list[str] = []

    def note(kernel: JITFunction, *args: Any, grid: tuple[int, ...], **constants: Any) -> None:
        *_, binder = kernel.device_caches[0]
        if (key := f"{name_of(kernel)} {binder(*args, **constants)[1]}") not in seen:
            seen.add(key)
            new.append(name_of(kernel))

    JITFunction.warmup = note
    found = []
    for tokens, offsets, before in CALLS:
        new.clear()
        drawn = draw(torch.Generator(), tokens, delta=delta, offsets=offsets, seen=before, sizes=(64, 64), levels=24)
        x = inputs(drawn.to(torch.bfloat16, torch.float32, "meta"))
        op = TritonLogLinearDelta() if delta else TritonLogLinear()
        launch.run_dry(lambda op=op, x=x: dispatch.dry_run(op, x, True, backward=True))
        found.append(list(new))
    return found


if __name__ == "__main__":
    pretend_there_is_a_gpu()
    for delta in (False, True):
        for kernels in new_kernels(delta):
            print(json.dumps(kernels))
