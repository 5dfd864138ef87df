"""The clock of the benchmarks that may run on several ranks."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class Clock:
    """Times calls that all ranks, if there are several, make together; of every run the slowest one counts."""

    def __init__(self, device: torch.device, runs: int):
        self.device, self.runs = device, runs

    def medians(self, calls: dict[str, Callable[[], object]], times: int = 1) -> dict[str, float]:
        """Seconds of each call, which is made `times` times in a row."""
        for call in calls.values():
            for _ in range(3):
                call()
        seen: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.runs):
            for name, call in calls.items():
                seen[name].append(self._once(call, times) / times)
        slowest = torch.tensor([seen[name] for name in calls], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return {name: statistics.median(row) for name, row in zip(calls, slowest.tolist(), strict=True)}

    def _once(self, call: Callable[[], object], times: int) -> float:
        if dist.is_initialized():
            dist.barrier()
        if self.device.type == "cpu":
            start = time.perf_counter()
            for _ in range(times):
                call()
            return time.perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(times):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3
