"""`SequenceParallel`, which lives as long as the process group, and `Sequence`, which is one batch."""

import zlib
from array import array
from collections.abc import Callable
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.conv import check_conv, convolve
from lasp.kernels.lasting import lasting
from lasp.kernels.linear import check_delta, check_linear, run_op
from lasp.kernels.recurrence import Alone, Boundary, Inputs
from lasp.kernels.softmax import Mask, check_softmax
from lasp.names import ExchangeName, LayoutName, SoftmaxName
from lasp.parallel import comm
from lasp.parallel.agreement import agree, agree_on_cpus, gradients, signature
from lasp.parallel.exchange import EXCHANGES, make_exchange
from lasp.parallel.halo import HaloPlan, halo
from lasp.parallel.layout import PADDING, Layout, Partition
from lasp.parallel.linear import AcrossDocuments, AcrossUnits, LocalSegments
from lasp.parallel.loss import accumulation_dtype, global_mean
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
        device: torch.device | str | None = None,
    ):
        self.group, self.rank, self.size = group, comm.rank(group), comm.size(group)
        checks.require(self.rank >= 0, "group", "a group without this process", "one that this process is in")
        self._messages = comm.message_device(group)

        def check() -> dict:
            self.device = self._messages if device is None else torch.device(device)
            checks.choice("state_exchange", state_exchange, EXCHANGES)
            checks.choice("softmax", softmax, STRATEGIES)
            return {"layout": Layout(layout, self.size), "state_exchange": state_exchange, "softmax": softmax}

        agree(group, self._messages, check, call="SequenceParallel")
        self.layout = Layout(layout, self.size)
        self.exchange = make_exchange(state_exchange, self.layout, group)
        self.softmax = SoftmaxStrategy(softmax, group)
        self._halos: dict[tuple[int, int, torch.device], HaloPlan] = {}

    def sequence(self, tokens: int, cu_seqlens: Tensor | None = None, *, aligned: bool = False) -> "Sequence":
        """One batch of sequences of `tokens` tokens, the same on every rank.

        Args:
            tokens: any length of at least 1, also fewer than there are units.
            cu_seqlens: [N + 1] int32 or int64 offsets of packed documents from 0 to `tokens`; a device tensor is copied
                to the host, once.
            aligned: make the units' length a power of two.

        Raises:
            ValueError: on every rank, if the arguments do not fit or differ between ranks.
        """

        def check() -> dict:
            checks.number("tokens", tokens, Integral, "at least 1")
            checks.require(tokens >= 1, "tokens", tokens, "at least 1")
            checks.cu_seqlens(cu_seqlens, 1, tokens)
            offsets = None if cu_seqlens is None else cu_seqlens.tolist()
            return {"tokens": int(tokens), "aligned": bool(aligned), "cu_seqlens": offsets}

        agree(self.group, self._messages, check, call="sequence")
        offsets = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        return Sequence(self, Partition(self.layout, self.rank, offsets, aligned), cu_seqlens is not None)

    @lasting
    def halo_plan(self, partition: Partition, width: int, device: torch.device) -> HaloPlan:
        key = (partition.unit_length, width, device)
        if key not in self._halos:
            self._halos[key] = HaloPlan.of(partition, width, self.group, device)
        return self._halos[key]


class Sequence:
    """One batch: which tokens this rank holds, and the ops over the whole sequence. Immutable.

    Local tensors are [B, T_local, ...] in local order: the rank's units, ascending. B = 1 if documents are packed.
    """

    def __init__(self, parallel: SequenceParallel, partition: Partition, packed: bool):
        self.parallel, self.partition, self.packed = parallel, partition, packed
        self._segments: dict[int, LocalSegments] = {}
        self._boundaries: dict[tuple[int, bool], Boundary] = {}
        offsets = zlib.crc32(array("q", partition.offsets).tobytes())
        self._identity = f"{partition.tokens} tokens, {partition.documents} documents ({offsets:x})"

    @cached_property
    @lasting
    def positions(self) -> Tensor:
        """[T_local] int64: each token's position within its document; 0 for padding."""
        device = self.parallel.device
        starts = [(f.position, f.position + len(f), f.document != PADDING) for f in self.partition.local]
        return torch.cat([torch.arange(start, stop, device=device) * real for start, stop, real in starts])

    @cached_property
    @lasting
    def valid(self) -> Tensor:
        """[T_local] bool: False for padding."""
        device = self.parallel.device
        return torch.cat([torch.full((len(f),), f.document != PADDING, device=device) for f in self.partition.local])

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x, which has `tokens` elements along `dim`, padded with zeros; differentiable. Sends
        nothing, so that what one rank gets wrong is a ValueError on that rank alone."""
        checks.require(x.shape[dim] == self.partition.tokens, "x", f"{x.shape[dim]} tokens", f"{self.partition.tokens}")
        return self._shard(x, dim)

    def unshard(self, local: Tensor, dim: int = 1) -> Tensor:
        """The inverse, on every rank: `tokens` elements along `dim`. Its gradient must be equal on all ranks."""

        def check() -> dict:
            checks.tensor("local", local)
            checks.number("dim", dim, Integral, "a dimension of local")
            checks.require(-local.ndim <= dim < local.ndim, "dim", dim, f"one of the {local.ndim} of local")
            expected = self.partition.local_tokens
            checks.require(local.shape[dim] == expected, "local", f"{local.shape[dim]} tokens", f"{expected}")
            return signature(local=local) | {"dim": dim % local.ndim}

        self._agree("unshard", check)
        return self._unshard(local, dim)

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None = None,
        *,
        scale: float | None = None,
        causal: bool = True,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`lasp.kernels.linear_attention` over the whole sequence.

        q, k, v, decay are this rank's; initial and final state [N, H, K, V] are the same on every rank, and so are
        their gradients. What one rank refuses, or calls otherwise than the others, is a ValueError on every rank of a
        CPU group, here and in all methods that send messages.
        """
        q, k, v = autocast.unify(q, k, v)

        def check() -> dict:
            check_linear(q, k, v, decay, causal)
            facts = self._check_recurrence(q, k, v, decay, None, scale, initial_state, output_final_state)
            return facts | {"causal": bool(causal)}

        self._agree("linear_attention", check)
        return self._recurrence(q, k, v, decay, None, scale, causal, initial_state, output_final_state)

    def delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None = None,
        *,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`lasp.kernels.delta_rule` over the whole sequence, with states as in `linear_attention`."""
        q, k, v = autocast.unify(q, k, v)

        def check() -> dict:
            check_delta(q, k, v, beta, decay)
            return self._check_recurrence(q, k, v, decay, beta, scale, initial_state, output_final_state)

        self._agree("delta_rule", check)
        return self._recurrence(q, k, v, decay, beta, scale, True, initial_state, output_final_state)

    def softmax_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
    ) -> Tensor:
        """`lasp.kernels.softmax_attention` over the whole sequence: o_i = Σ_j softmax_j(scale · q_i·k_j) v_j.

        Args:
            q: [B, T_local, H, K]; k, v: [B, T_local, Hkv, K], [B, T_local, Hkv, V]; this rank's, all of one dtype.
            scale: K ** -0.5 if None.
            causal: a token sees itself and what comes before in its document, else all of its document.
            window: a token sees tokens less than `window` away, itself included.

        Returns:
            This rank's o [B, T_local, H, V] in q's dtype; sums over blocks and ranks are fp32 (fp64 for fp64).

        Raises:
            ValueError: on every rank of a CPU group, for what does not fit, also heads that "ulysses" or "ulysses_ring"
                cannot split.
        """
        q, k, v = autocast.cast(q, k, v)

        self._agree("softmax_attention", lambda: self._check_softmax(q, k, v, scale, causal, window))
        mask = Mask(checks.scale(scale, q.shape[-1]), causal, window, lasting=not self.packed)
        return self.parallel.softmax.attend(q, k, v, mask, self.partition)

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`lasp.kernels.causal_conv1d` over the whole sequence: y [B, T_local, D].

        The gradients of weight and bias are this rank's part of a sum.
        """

        def check() -> dict:
            check_conv(x, weight, bias)
            self._check_tokens(x)
            return signature(x=x, weight=weight, bias=bias) | gradients(x)

        self._agree("causal_conv1d", check)
        local, width = self._local(x.shape[0]), weight.shape[1]
        x, tail = self._tail(x, width) if width > 1 else (x, None)
        return local.unfold(convolve(local.fold(x), weight, bias, tail, local.segments))

    def mean(self, loss_sum: Tensor, count: Tensor) -> Tensor:
        """The mean over the whole group, Σ loss_sum / Σ count, on every rank; backward gives each rank its gradient.

        loss_sum: scalar, this rank's sum. count: scalar, this rank's number of terms. 0 where there is none anywhere.
        """

        def check() -> dict:
            checks.tensor("loss_sum", loss_sum)
            checks.require(loss_sum.is_floating_point(), "loss_sum", f"dtype {loss_sum.dtype}", "floating point")
            checks.shape("loss_sum", loss_sum, (), "a scalar")
            if isinstance(count, Tensor):
                checks.shape("count", count, (), "a scalar")
            else:
                checks.number("count", count, Real, "a number")
            return {"loss_sum": accumulation_dtype(loss_sum)}

        self._agree("mean", check)
        return global_mean(loss_sum, count, self.parallel.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, on every rank: for statistics of the whole sequence. No gradient goes through."""

        def check() -> dict:
            checks.tensor("x", x)
            return signature(x=x)

        self._agree("sum", check)
        return comm.all_reduce(x.detach(), self.parallel.group).wait()

    @torch.compiler.disable
    def _agree(self, method: str, check: Callable[[], dict]) -> None:
        agree_on_cpus(self.parallel.group, lambda: check() | {"sequence": self._identity}, call=method)

    @torch.compiler.disable  # messages have no place in a graph: a compiled model breaks here, once, and goes on behind
    def _recurrence(self, q, k, v, decay, beta, scale, causal, initial_state, output_final_state):
        local = self._local(v.shape[0])
        per_token = None if decay is None or decay.ndim == 1 else local.fold(decay)
        x = Inputs(
            local.fold(q),
            local.fold(k),
            local.fold(v),
            decay if per_token is None else per_token,
            None if beta is None else local.fold(beta),
            checks.scale(scale, k.shape[-1]),
            local.segments,
        )
        o, final_state = run_op(
            x,
            self._boundary(v.shape[0], causal),
            causal=causal,
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
        return local.unfold(o), final_state

    def _boundary(self, batch: int, causal: bool) -> Boundary:
        if self.partition.layout.units == 1:
            return Alone()
        if (batch, causal) not in self._boundaries:
            across = AcrossUnits if causal else AcrossDocuments
            made = across(self.partition, batch, self.parallel.group, self.parallel.exchange)
            self._boundaries[batch, causal] = made
        return self._boundaries[batch, causal]

    def _tail(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """x, to go on with, and [N, width - 1, D] for every fragment: what precedes it within its document."""
        plan = self.parallel.halo_plan(self.partition, width, x.device)
        x, before = halo(x, plan, len(self.partition.owned), width)
        tails = x.new_zeros(x.shape[0], len(self.partition.local), *before.shape[2:])
        place = torch.arange(width - 1, 0, -1, device=x.device)  # distance before the unit
        for unit, index in enumerate(self.partition.first):
            same_document = place <= self.partition.local[index].position
            tails[:, index] = before[:, unit] * same_document[:, None]
        return x, tails.flatten(0, 1)

    @lasting
    def _local(self, batch: int) -> LocalSegments:
        if batch not in self._segments:
            self._segments[batch] = LocalSegments(self.partition, batch)
        return self._segments[batch]

    def _unshard(self, local: Tensor, dim: int) -> Tensor:
        return _Unshard.apply(local, self, dim)

    def _shard(self, x: Tensor, dim: int) -> Tensor:
        parts = []
        for start, stop in self.partition.ranges:
            start, end = min(start, x.shape[dim]), min(stop, x.shape[dim])
            parts.append(x.narrow(dim, start, end - start))
        missing = self.partition.local_tokens - sum(part.shape[dim] for part in parts)
        if missing:
            shape = list(x.shape)
            shape[dim] = missing
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, dim)

    def _check_recurrence(self, q, k, v, decay, beta, scale, initial_state, output_final_state) -> dict:
        self._check_tokens(v)
        checks.state(initial_state, self._states(v.shape[0]), v, q.shape[-1])
        asked = gradients(q, k, v, decay, beta, initial_state) | gradients(initial_state, of="initial_state")
        options = {"scale": checks.scale(scale, q.shape[-1]), "output_final_state": bool(output_final_state)}
        return signature(q=q, v=v, decay=decay, initial_state=initial_state) | asked | options

    def _states(self, batch: int) -> int:
        """How many initial and final states there are."""
        return batch * self.partition.documents

    def _check_softmax(self, q, k, v, scale, causal, window) -> dict:
        check_softmax(q, k, v, window)
        checks.require(k.shape[1] == q.shape[1], "k", f"{k.shape[1]} tokens", f"{q.shape[1]}, as q")
        self.parallel.softmax.check(q, k, self.partition)
        self._check_tokens(q)
        options = {"scale": checks.scale(scale, q.shape[-1]), "causal": bool(causal), "window": window}
        return signature(q=q, k=k, v=v) | gradients(q, k, v) | options

    def _check_tokens(self, x: Tensor) -> None:
        expected = self.partition.local_tokens
        checks.require(x.shape[1] == expected, "tokens", x.shape[1], f"{expected}, this rank's share of the sequence")
        checks.require(x.shape[0] == 1 or not self.packed, "batch", x.shape[0], "1 for packed documents")


class _Unshard(autocast.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, sequence: Sequence, dim: int) -> Tensor:
        ctx.sequence, ctx.dim = sequence, dim
        parallel, partition = sequence.parallel, sequence.partition
        units = comm.replicate(local.movedim(dim, 0), parallel.group).flatten(0, 1)
        units = units.unflatten(0, (partition.layout.units, partition.unit_length))[partition.layout.rank_order]
        return units.flatten(0, 1)[: partition.tokens].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return ctx.sequence._shard(d, ctx.dim), None, None
