"""Every rank reads its peers' summaries out of memory that all of them see, weights and adds them: csrc/channel.h.

On GPUs that is symmetric memory, read through NVLink; in processes on a CPU, pages that they share. Only for the ranks
of one machine, and only where the native code compiles: all ranks decide together, once, and take the all-gather if it
cannot be.
"""

import ctypes
import logging
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel import comm, native
from lasp.parallel.combine import reach
from lasp.parallel.comm import Group
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.layout import Layout

LOG = logging.getLogger("lasp")
SHARED_PAGES = Path("/dev/shm")


@dataclass(frozen=True)
class Shared:
    """Memory of every rank: `table` is the address of their addresses, and `alive` what must not be freed."""

    table: int
    local: Tensor
    alive: Any


class SymmetricMemory:
    """Transitions are sent again in backward rather than kept: they weigh no more than the state, and are read once."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup):
        self.layout, self.group, self.rank = layout, group, comm.rank(group)
        self.device = comm.message_device(group)
        self.library, self.patience = native.load(self.device), comm.timeout(group)
        self.error = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._shared: dict[int, Shared] = {}

    def forward(
        self, states: Tensor, transitions: Tensor | None, breaks: list[bool]
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        return self._exchange(states, transitions, breaks, backward=False).then(lambda x: (x, transitions))

    def backward(self, d: Tensor, transitions: Tensor | None, breaks: list[bool]) -> Pending[Tensor]:
        return self._exchange(d, transitions, breaks, backward=True)

    def check(self) -> None:
        """Raises RuntimeError if a rank did not come. Reads a word of the host's memory and does not wait for the GPU:
        on a GPU, what a call that failed returns is NaN, and one of the next calls raises."""
        if late := int(self.error[0]):
            raise RuntimeError(f"state_exchange: rank {late - 1} of the group did not come within {self.patience:g} s")

    def _exchange(
        self, states: Tensor, transitions: Tensor | None, breaks: list[bool], backward: bool
    ) -> Pending[Tensor]:
        self.check()
        states = states.contiguous()
        transitions = None if transitions is None else transitions.contiguous()
        size = states.nbytes + (0 if transitions is None else transitions.nbytes)
        size = -(-size // 256) * 256
        if size not in self._shared:
            share = _share_pages if self.device.type == "cpu" else _share_gpu_memory
            self._shared[size] = share(2 * size + 4 * self.layout.ranks, self.device, self.group)
        shared, (units, batch, heads, key_dim, value_dim) = self._shared[size], states.shape
        reaches = [reach(breaks, unit, backward=backward) for unit in self.layout.owned(self.rank)]
        channel = native.Channel(
            buffers=shared.table,
            local=shared.local.data_ptr(),
            error=self.error.data_ptr(),
            slot_bytes=size,
            patience_ns=int(self.patience * 1e9),
            rank=self.rank,
            layout=native.Layout(self.layout.ranks, units),
            shape=native.Shape(
                batch * heads, key_dim, value_dim, 0 if transitions is None else transitions.ndim - states.ndim + 3
            ),
            backward=backward,
            reach=(ctypes.c_int32 * 2)(*reaches),
        )

        def launch() -> Tensor:
            arrived = torch.empty_like(states)
            stream = torch.cuda.current_stream().cuda_stream if states.is_cuda else None
            sent = None if transitions is None else transitions.data_ptr()
            pointers = states.data_ptr(), sent, arrived.data_ptr(), stream
            code = self.library.lasp_exchange(ctypes.byref(channel), states.dtype == torch.float64, *pointers)
            if code:
                raise RuntimeError(f"state_exchange: CUDA error {code} at launch")
            return arrived

        if states.is_cuda:
            return comm.on_stream(launch, states, transitions)
        arrived = launch()
        self.check()
        return Pending(lambda: arrived)


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
    return Shared(ctypes.addressof(table), torch.zeros(3, dtype=torch.int32), (table, buffers))


def _share_gpu_memory(size: int, device: torch.device, group: dist.ProcessGroup) -> Shared:
    """Symmetric memory; zeroed on all ranks before any of them signals."""
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(buffer, group.group_name)
    local = torch.zeros(3, dtype=torch.int32, device=device)
    buffer.zero_()
    torch.cuda.synchronize(device)
    comm.gather_objects(None, group)
    return Shared(handle.buffer_ptrs_dev, local, (buffer, handle))
