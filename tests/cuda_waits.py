"""What makes the host wait for its GPU, as CUDA sees it."""

import math
import traceback
import warnings
from types import TracebackType
from typing import Self

import torch

from lasp.training import reading, train


class CudaWaits:
    """Between `watch(True)` and `watch(False)` `seen` gets the stack of each operation for which the host waits.

    They are warnings and not errors, with which a rank would leave the others alone.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watch(self, on: bool) -> None:
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def __enter__(self) -> Self:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._take
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.watch(False)
        self._warnings.__exit__(*error)

    def _take(self, message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            lines = traceback.format_list(traceback.extract_stack()[-12:-1])
            self.seen.append("".join(lines))


def require_no_cuda_waits(config, monkeypatch):
    """Of nine steps, whose numbers are logged after the first, the fifth and the last."""
    add, waits = reading.Reader.add, CudaWaits()
    monkeypatch.setattr(reading, "PERIOD", math.inf)

    def added(self, step):
        add(self, step)
        waits.watch(step.number in (6, 7))

    monkeypatch.setattr(reading.Reader, "add", added)
    with waits:
        train.train(config)
        waits.watch(True)
        torch.ones((), device="cuda").item()
    assert len(waits.seen) == 1, "\n".join(waits.seen[:3])  # the last one shows that they are seen
