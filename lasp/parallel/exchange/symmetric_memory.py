"""Every rank writes its summaries into memory of those that they reach, where these weigh and add them: csrc/channel.h.

On GPUs that is symmetric memory, written through NVLink; in processes on a CPU, pages that they share. Only for the
ranks of one machine, and only where the native code compiles: all ranks decide together, once, and take the all-gather
if it cannot be.

An exchange is two kernels on the current stream, and what its caller computes between start and wait runs between them,
while the others' summaries come in; in backward also beside the first, which takes few multiprocessors there and is
not waited for (lasp.kernels.triton.pdl). There is no stream beside it: the second kernel reads what is near, in a
few microseconds, and the events that would tie another stream to this one take longer, on the host several times as
long.
"""

import ctypes
import logging
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.lasting import lasting
from lasp.kernels.pending import Pending
from lasp.kernels.summary import Transition
from lasp.parallel import comm, native
from lasp.parallel.combine import Affine
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.layout import Layout

LOG = logging.getLogger("lasp")
SHARED_PAGES = Path("/dev/shm")
SMALLEST_SLOT = 4096  # bytes


@dataclass(frozen=True)
class Shared:
    """Memory of every rank. table: the address of an array of buffers' addresses. local: this rank's own counters.
    alive: what must not be freed while the others are used."""

    table: int
    local: Tensor
    alive: Any


class SymmetricMemory:
    """Transitions are sent again in backward rather than kept: they weigh no more than the state.

    Calls follow one another, as every rank must make them in the same order. One that starts while another has not been
    waited for collects that first, and one on another stream than the last goes on behind that.
    """

    affine_only = True

    @lasting
    def __init__(self, layout: Layout, group: dist.ProcessGroup):
        self.layout, self.group, self.rank = layout, group, comm.rank(group)
        self.device = comm.message_device(group)
        self.library, self.patience = native.load(self.device), comm.timeout(group)
        self.error = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self.device.type == "cuda")
        self._late = ctypes.c_int32.from_address(self.error.data_ptr())
        self._shared: dict[int, Shared] = {}
        self._call = lru_cache(maxsize=1024)(self._prepare)
        self._under_way: Callable[[], Tensor] | None = None
        self._last_stream: tuple[int, torch.cuda.Stream] | None = None

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Affine
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        return self._exchange(states, transitions, algebra).then(lambda x: (x, transitions))

    def backward(self, d: Tensor, transitions: Tensor | None, algebra: Affine) -> Pending[Tensor]:
        return self._exchange(d, transitions, algebra)

    def check(self) -> None:
        """Raises RuntimeError if a rank did not come. Reads a word of the host's memory and does not wait for the GPU:
        on a GPU, what a call that failed returns is NaN, and one of the next calls raises."""
        if late := self._late.value:
            raise RuntimeError(f"state_exchange: rank {late - 1} of the group did not come within {self.patience:g} s")

    def _exchange(self, states: Tensor, transitions: Tensor | None, algebra: Affine) -> Pending[Tensor]:
        self.check()
        if self._under_way is not None:
            self._under_way()
        states = states.contiguous()
        transitions = None if transitions is None else transitions.contiguous()
        kind = Transition.of(transitions, states)  # the numbers are those of csrc/combine.h
        call = self._call(states.shape, kind, states.dtype, algebra)
        sent = None if transitions is None else transitions.data_ptr()
        self._run(self.library.lasp_publish, *call, states.data_ptr(), sent)
        arrived: list[Tensor] = []
        being_sent = [states, transitions]  # what runs meanwhile must not get their memory

        def collect() -> Tensor:
            if not arrived:
                self._under_way = None
                arrived.append(torch.empty_like(states))
                self._run(self.library.lasp_collect, *call, arrived[0].data_ptr())
                being_sent.clear()
            if self.device.type == "cpu":
                self.check()
            return arrived[0]

        self._under_way = collect
        return Pending(collect)

    def _run(self, function: Callable[..., int], *arguments: Any) -> None:
        if code := function(*arguments, self._stream()):
            raise RuntimeError(f"state_exchange: CUDA error {code} at launch")

    def _stream(self) -> int | None:
        """The current stream, behind what the call before has put on its own."""
        if self.device.type == "cpu":
            return None
        current = torch._C._cuda_getCurrentRawStream(self.device.index)
        if self._last_stream is None or self._last_stream[0] != current:
            stream = torch.cuda.current_stream(self.device)
            # What is captured cannot wait for what is not; before a capture begins, the device has been waited for.
            if self._last_stream is not None and not torch.cuda.is_current_stream_capturing():
                stream.wait_stream(self._last_stream[1])
            self._last_stream = current, stream
        return current

    @lasting
    def _prepare(self, shape: torch.Size, transition: int, dtype: torch.dtype, algebra: Affine) -> tuple[Any, bool]:
        """What csrc/channel.h needs to know of such calls, and whether they are in float64; collective where memory for
        states so large is not there yet."""
        (units, batch, heads, key_dim, value_dim), ranks, owned = shape, self.layout.ranks, self.layout.owned(self.rank)
        opposite = Affine(algebra.breaks, not algebra.backward)
        kind = native.Shape(batch * heads, key_dim, value_dim, transition)
        size = self.layout.units * kind.unit_bytes(dtype.itemsize)
        slot = max(SMALLEST_SLOT, 1 << (size - 1).bit_length())  # few sizes, however many shapes there are
        if slot not in self._shared:
            share = _share_pages if self.device.type == "cpu" else _share_gpu_memory
            self._shared[slot] = share(2 * slot + 4 * ranks * native.PARTS, self.device, self.group)
        shared, first = self._shared[slot], self.layout.units - 1 if algebra.backward else 0
        channel = native.Channel(
            buffers=shared.table,
            local=shared.local.data_ptr(),
            error=self.error.data_ptr(),
            slot_bytes=slot,
            patience_ns=int(self.patience * 1e9),
            rank=self.rank,
            layout=native.Layout(ranks, units),
            shape=kind,
            backward=algebra.backward,
            reach=native.Pair(*(algebra.reach(unit) for unit in owned)),
            spread=native.Pair(*(opposite.reach(unit) for unit in owned)),
            passes=native.Pair(*(unit != first and not algebra.breaks[unit] for unit in owned)),
        )
        return ctypes.byref(channel), dtype == torch.float64


def symmetric_memory(layout: Layout, group: Group) -> SymmetricMemory | AllGather:
    """The exchange, or the all-gather where some rank cannot take part; says so once."""
    if group is None or comm.size(group) == 1:
        return AllGather(layout, group)
    hosts = comm.gather_objects((socket.gethostname(), comm.message_device(group).index), group)
    refusals = comm.gather_objects(_refusal(comm.message_device(group), hosts), group)
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            if comm.rank(group) == 0:
                LOG.warning("state_exchange: all_gather, since symmetric_memory cannot be: rank %d: %s", rank, refusal)
            return AllGather(layout, group)
    return SymmetricMemory(layout, group)


def _refusal(device: torch.device, ranks: list[tuple[str, int | None]]) -> str | None:
    """Why this rank cannot take part, or None."""
    if len({host for host, _ in ranks}) > 1:
        return "the ranks are on several machines"
    if device.type == "cpu" and not SHARED_PAGES.is_dir():
        return f"there is no {SHARED_PAGES}"
    for _, index in ranks:
        visible = index is not None and index != device.index and index < torch.cuda.device_count()
        if visible and not torch.cuda.can_device_access_peer(device, index):
            return f"no peer access from {device} to cuda:{index}"
    try:
        native.load(device)
    except native.Unavailable as reason:
        return str(reason)
    return None


def _share_pages(size: int, device: torch.device, group: dist.ProcessGroup) -> Shared:
    """Files in memory, which every rank maps; their names are gone when all have."""
    with tempfile.NamedTemporaryFile(dir=SHARED_PAGES) as file:
        file.truncate(size)
        names = comm.gather_objects(file.name, group)
        buffers = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
        comm.gather_objects(None, group)
    table = (ctypes.c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))
    local = torch.zeros(native.PARTS + 1, dtype=torch.int32, device=device)
    return Shared(ctypes.addressof(table), local, (table, buffers))


def _share_gpu_memory(size: int, device: torch.device, group: dist.ProcessGroup) -> Shared:
    """Symmetric memory; zeroed on all ranks before any of them signals."""
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(buffer, group.group_name)
    local = torch.zeros(native.PARTS + 1, dtype=torch.int32, device=device)
    buffer.zero_()
    torch.cuda.synchronize(device)
    comm.gather_objects(None, group)
    return Shared(handle.buffer_ptrs_dev, local, (buffer, handle))
