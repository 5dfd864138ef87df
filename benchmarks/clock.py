"""The clock of the benchmarks that may run on several ranks."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class Clock:
    """Times calls that all ranks, if there are several, make together; of every run the slowest one counts.

    warm_ups: calls that are made before. In CUDA graphs there are always three.
    """

    def __init__(self, device: torch.device, runs: int, warm_ups: int = 3):
        self.device, self.runs, self.warm_ups = device, runs, warm_ups

    def medians(self, calls: dict[str, Callable[[], object]], times: int = 1, graphs: bool = False) -> dict[str, float]:
        """Seconds of each call, which is made `times` times in a row.

        graphs: on a GPU the calls are captured into CUDA graphs, which are replayed, so that the host has no part in
        the time. They must be capturable: nothing waits for the GPU, and no tensor comes from the host.
        """
        if captured := graphs and self.device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()  # one for all: they are replayed one after the other
            calls = {name: self._capture(call, times, pool).replay for name, call in calls.items()}
        for call in calls.values():
            for _ in range(self.warm_ups):
                call()
        seen: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.runs):
            for name, call in calls.items():
                seen[name].append(self._once(call, 1 if captured else times) / times)
        slowest = torch.tensor([seen[name] for name in calls], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return {name: statistics.median(row) for name, row in zip(calls, slowest.tolist(), strict=True)}

    def _capture(self, call: Callable[[], object], times: int, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
        """`times` calls as one graph, after some that set things up, on a stream that is not the default one either."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=pool, capture_error_mode="thread_local"
        ):  # NCCL looks at its streams from another thread
            for _ in range(times):
                call()
        return graph

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
