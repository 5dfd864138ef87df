"""In Triton's interpreter, kernels that read or write beside the tensors they are given fail."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()


def extent(x: torch.Tensor) -> int:
    """Bytes from its first number to its last, which may have others between them."""
    if x.numel() == 0:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))) * x.itemsize


@pytest.fixture(autouse=INTERPRETED)
def bounded(monkeypatch):
    """What an access does not mask lies in one of the launch's tensors."""
    from triton.runtime import interpreter

    tensors: list[tuple[int, int]] = []  # where each begins and ends
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def check(pointers, mask) -> None:
        addresses = pointers.data.astype(np.int64)
        kept = mask.data.astype(bool)  # the interpreter makes integers of a block's mask combined with a scalar
        if not kept.all():
            addresses = addresses[np.broadcast_to(kept, addresses.shape)]
        if addresses.size == 0:
            return
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        first, last = addresses.min(), addresses.max() + size
        assert any(begin <= first and last <= end for begin, end in tensors), "an access beside the tensor it begins in"

    def checked_load(self, pointers, mask, *args):
        check(pointers, mask)
        return load(self, pointers, mask, *args)

    def checked_store(self, pointers, value, mask, *args):
        check(pointers, mask)
        return store(self, pointers, value, mask, *args)

    def noted_launch(self, *args, **options):
        tensors[:] = [(x.data_ptr(), x.data_ptr() + extent(x)) for x in args if isinstance(x, torch.Tensor)]
        return launch(self, *args, **options)

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(executor, "__call__", noted_launch)
