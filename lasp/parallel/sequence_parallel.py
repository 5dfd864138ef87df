"""`SequenceParallel`: how sequences are split over a process group, as long as that lives."""

from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import checks
from lasp.kernels.lasting import lasting
from lasp.names import ExchangeName, LayoutName, SoftmaxName
from lasp.parallel import comm
from lasp.parallel.agreement import agree
from lasp.parallel.exchange import EXCHANGES, make_exchange
from lasp.parallel.halo import HaloPlan
from lasp.parallel.layout import Layout, Partition
from lasp.parallel.sequence import Sequence
from lasp.parallel.softmax import STRATEGIES, SoftmaxStrategy


class SequenceParallel:
    """Splits sequences over the ranks of a process group.

    Args:
        group: a ProcessGroup, or None for one rank alone.
        layout: "contiguous" (rank r holds the r-th part) or "zigzag" (parts r and 2R - 1 - r of 2R, which balances
            causal softmax attention).
        state_exchange: how linear layers' states travel: "auto", "all_gather" (LASP-2), "ring" (LASP-1), "scan" (ZeCO's
            All-Scan, pipelined), "hierarchical" (all-gather in each machine, scan across them) or "symmetric_memory"
            (peer writes; a group of one machine, else "all_gather").
        softmax: how softmax layers work: "auto", "ring", "all_gather" (of keys and values), "ulysses" (heads are
            split instead) or "ulysses_ring" (heads as far as they divide, a ring for the rest).
        aligned: make the length of all units a power of two, as log-linear attention needs it. One unit alone keeps its
            own.
        device: where `Sequence.positions` and `Sequence.valid` live; the current GPU for an NCCL group, else the CPU.

    Collective: all ranks of the group make it together.

    Raises:
        ValueError: an unknown name or a group that this process is not in, and options that differ between the ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        layout: LayoutName = "contiguous",
        state_exchange: ExchangeName = "auto",
        softmax: SoftmaxName = "auto",
        aligned: bool = False,
        device: torch.device | str | None = None,
    ):
        self.group, self.rank, self.size = group, comm.rank(group), comm.size(group)
        self.options = f"{layout}, {state_exchange}, {softmax}"  # what else ranks must have chosen alike
        self.aligned = aligned
        checks.require(self.rank >= 0, "group", "a group without this process", "one that this process is in")

        def check() -> dict:
            self.device = comm.message_device(group) if device is None else torch.device(device)
            checks.choice("state_exchange", state_exchange, EXCHANGES)
            checks.choice("softmax", softmax, STRATEGIES)
            chosen = {"state_exchange": state_exchange, "softmax": softmax, "aligned": bool(aligned)}
            return {"layout": Layout(layout, self.size)} | chosen

        agree(group, check, call="SequenceParallel")
        self.layout = Layout(layout, self.size)
        self.exchange = make_exchange(state_exchange, self.layout, group)
        self.softmax = SoftmaxStrategy(softmax, group)
        self._halos: dict[tuple[int, int, torch.device], HaloPlan] = {}

    def sequence(self, tokens: int, cu_seqlens: Tensor | None = None, *, aligned: bool = False) -> Sequence:
        """One batch of sequences of `tokens` tokens, the same on every rank.

        Args:
            tokens: any length of at least 1, also fewer than there are units.
            cu_seqlens: [N + 1] int32 or int64 offsets of packed documents from 0 to `tokens`; a device tensor is copied
                to the host, once.
            aligned: of this sequence, if it is not so for all of them.

        Raises:
            ValueError: on every rank, if the arguments do not fit or differ between ranks.
        """

        def check() -> dict:
            checks.number("tokens", tokens, Integral, "at least 1")
            checks.require(tokens >= 1, "tokens", tokens, "at least 1")
            checks.cu_seqlens(cu_seqlens, 1, tokens)
            offsets = None if cu_seqlens is None else cu_seqlens.tolist()
            return {"tokens": int(tokens), "aligned": bool(aligned), "cu_seqlens": offsets}

        agree(self.group, check, call="sequence")
        return self.agreed_sequence(tokens, cu_seqlens, aligned=aligned)

    def agreed_sequence(self, tokens: int, cu_seqlens: Tensor | None = None, *, aligned: bool = False) -> Sequence:
        """The same for right arguments of which the ranks know that they agree on them. Sends nothing."""
        offsets = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        return Sequence(
            self, Partition(self.layout, self.rank, offsets, aligned or self.aligned), cu_seqlens is not None
        )

    @lasting
    def halo_plan(self, partition: Partition, width: int, device: torch.device) -> HaloPlan:
        key = (partition.unit_length, width, device)
        if key not in self._halos:
            self._halos[key] = HaloPlan.of(partition, width, self.group, device)
        return self._halos[key]
