"""Tensors that wait for their next use, on their device or in the host's memory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from lasp.kernels.pending import Pending

Name = TypeVar("Name")


class Parked:
    """A tensor, until it is fetched: where it is or, with `on_host`, in the host's pinned memory if it is a GPU's.

    Copies run on streams of their own, one for each direction. Without them `fetch` gives the tensor itself, which is
    the caller's to change if it then calls `put`.
    """

    def __init__(self, x: Tensor, on_host: bool):
        x = x.detach()
        self.device = x.device
        self.away = on_host and x.is_cuda
        if self.away:
            self._held = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self.put(x)
        else:  # a view would keep alive what it is a view of
            self._held = x if x.untyped_storage().nbytes() == x.nbytes else x.clone()

    def put(self, x: Tensor) -> None:
        """x, of the same shape, in its place."""
        if self.away:
            self._stored = _copy(x, self._held, _stream(self.device, "to the host"))
        else:
            self._held = x

    def fetch(self) -> Pending[Tensor]:
        """Starts to bring it back to its device."""
        if not self.away:
            return Pending(lambda: self._held)
        stream = _stream(self.device, "from the host")
        stream.wait_event(self._stored)
        x = torch.empty(self._held.shape, dtype=self._held.dtype, device=self.device)
        arrived = _copy(self._held, x, stream)

        def finish() -> Tensor:
            torch.cuda.current_stream(self.device).wait_event(arrived)
            return x

        return Pending(finish)


def fetch_ahead(parked: Iterable[tuple[Name, Sequence[Parked]]]) -> Iterator[tuple[Name, list[Tensor]]]:
    """All of them, those of each name together; the next ones are on their way while the present ones are used."""
    coming: tuple[Name, list[Pending[Tensor]]] | None = None
    for name, tensors in parked:
        present, coming = coming, (name, [each.fetch() for each in tensors])
        if present is not None:
            yield present[0], [each.wait() for each in present[1]]
    if coming is not None:
        yield coming[0], [each.wait() for each in coming[1]]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, from the host, of which it does not keep a GPU's stream waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def index_tensor(places: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Integers on a device, for which the host does not wait."""
    return to_device(torch.tensor(places, dtype=dtype, device="cpu"), device)


@cache
def _stream(device: torch.device, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copy(source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """On that stream, after all that the current one was given so far."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    for x in (source, target):
        if x.is_cuda:
            x.record_stream(stream)
    return stream.record_event()
