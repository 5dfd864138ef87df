"""Tensors that autograd saves, in host memory until backward comes to them."""

from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Way(Protocol):
    """To the host and back. A copy may be under way when these return; `arrived` waits for the last one back."""

    def away(self, x: Tensor) -> Tensor: ...

    def back(self, host: Tensor) -> Tensor: ...

    def arrived(self, x: Tensor) -> Tensor: ...


class HostMemory:
    """Saves tensors in pinned memory of the host, for one pass forward and backward; hooks for `saved_tensors_hooks`.

    They come back in reverse order: when one is asked for, the one before it starts on its way. Copies go over a stream
    of their own, beside what is computed. On a CPU they are plain copies, on the same path. What has no numbers, or is
    elsewhere, stays where it is: PyTorch saves such tensors for itself.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._way: Way = SideStream(device) if device.type == "cuda" else Copies()
        self._last: Entry | None = None

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._save, self._load)

    def _save(self, x: Tensor) -> "Entry | Tensor":
        if x.device.type != self._device.type or x.numel() == 0:
            return x
        self._last = Entry(self._way.away(x), self._last)
        return self._last

    def _load(self, entry: "Entry | Tensor") -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        x = self._way.arrived(entry.fetch(self._way))
        entry.coming = None
        if entry.before is not None:
            entry.before.fetch(self._way)
        return x


@dataclass
class Entry:
    """A tensor on the host, the one that was saved before it, and what is on its way back."""

    host: Tensor
    before: "Entry | None" = field(repr=False)
    coming: Tensor | None = None

    def fetch(self, way: Way) -> Tensor:
        if self.coming is None:
            self.coming = way.back(self.host)
        return self.coming


class Copies:
    """On a CPU."""

    def away(self, x: Tensor) -> Tensor:
        return x.clone()

    def back(self, host: Tensor) -> Tensor:
        return host.clone()

    def arrived(self, x: Tensor) -> Tensor:
        return x


class SideStream:
    """From a GPU to pinned memory and back. Memory is given back to PyTorch only after the copy that uses it."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, _side_stream(device)

    def away(self, x: Tensor) -> Tensor:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._copy(host, x)
        x.record_stream(self.stream)
        return host

    def back(self, host: Tensor) -> Tensor:
        x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._copy(x, host)
        x.record_stream(self.stream)
        return x

    def arrived(self, x: Tensor) -> Tensor:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return x

    def _copy(self, to: Tensor, source: Tensor) -> None:
        """After all that has been asked of the GPU so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            to.copy_(source, non_blocking=True)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
