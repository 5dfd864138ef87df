"""What else benchmarks tell of a call, besides its time."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn


class Watched:
    """A call that notes the most memory that was taken during it, and how much of its time some modules took.

    parts: modules that run one after the other; forward (recomputation included) and backward count.
    """

    def __init__(self, call: Callable[[], object], device: torch.device, parts: Sequence[nn.Module] = ()):
        self.call, self.device, self.parts = call, device, parts
        self._peak = 0
        self._whole: list[object] = []
        self._spans: list[list[object]] = []

    def __call__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._spans = []
        hooks = [
            hook
            for part in self.parts
            for hook in (
                part.register_forward_pre_hook(self._begin),
                part.register_forward_hook(self._end),
                part.register_full_backward_pre_hook(self._begin),
                part.register_full_backward_hook(self._end),
            )
        ]
        first = self._now()
        self.call()
        self._whole = [first, self._now()]
        for hook in hooks:
            hook.remove()
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)

    def peak_bytes(self) -> int | None:
        """In the last call, on the rank that took most, weights and inputs included; all ranks ask. None for CPUs."""
        if self.device.type == "cpu":
            return None
        peak = torch.tensor(self._peak, device=self.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak.item())

    def share(self) -> float | None:
        """Of this rank's time in the last call, what its parts took; None if there are none."""
        if not self.parts:
            return None
        return sum(self._between(*span) for span in self._spans) / self._between(*self._whole)

    def _begin(self, *_: object) -> None:
        self._spans.append([self._now()])

    def _end(self, *_: object) -> None:
        self._spans[-1].append(self._now())

    def _now(self) -> object:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first, last) -> float:
        if self.device.type == "cpu":
            return last - first
        last.synchronize()
        return first.elapsed_time(last) * 1e-3
