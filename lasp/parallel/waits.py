"""How long this rank waits for messages: the rank that waits least is the one that the others wait for.

On CPUs it is the host that waits. On GPUs it is the stream in which the wait is put, which two events measure.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Waits:
    """Measures only inside of `measured`, since events that nobody takes would pile up."""

    def __init__(self) -> None:
        self.measuring = False
        self.seconds = 0.0
        self.stalls: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False
            self.take()

    def during(self, wait: Callable[[], Result], device: torch.device) -> Result:
        """What `wait` returns; its time counts."""
        if not self.measuring:
            return wait()
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(torch.cuda.current_stream(device))
            result = wait()
            after.record(torch.cuda.current_stream(device))
            self.stalls.append((before, after))
            return result
        begun = time.perf_counter()
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - begun

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        stalls, self.stalls = self.stalls, []
        for before, after in stalls:
            after.synchronize()
            seconds += before.elapsed_time(after) / 1000
        return seconds


waits = Waits()  # of this process
