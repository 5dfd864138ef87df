"""`Sequence`: one batch, and the ops over all of its tokens."""

import zlib
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Numbers
from functools import cached_property, partial
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lasp.kernels import autocast, checks
from lasp.kernels.conv import check_conv, check_parts, convolve, like_input, like_parts
from lasp.kernels.delta_product import delta_product_inputs, run_product
from lasp.kernels.fenwick import FenwickState
from lasp.kernels.inputs import Inputs
from lasp.kernels.lasting import lasting
from lasp.kernels.linear import delta_inputs, linear_inputs, run_op
from lasp.kernels.log_linear import log_linear_delta_inputs, log_linear_inputs
from lasp.kernels.parts import Parts, undivided, whole
from lasp.kernels.recurrence import Alone, Boundary, Op, run
from lasp.kernels.softmax import Mask, check_softmax, like_output
from lasp.kernels.traced import Handle, apart, open_to_graphs, traced
from lasp.parallel import comm, log_linear, shapes
from lasp.parallel.agreement import Agreed, agree_on_cpus, gradients, signature
from lasp.parallel.boundary import AcrossDocuments, AcrossUnits, LocalSegments
from lasp.parallel.comm import Group
from lasp.parallel.exchange import StateExchange
from lasp.parallel.halo import fragment_tails
from lasp.parallel.layout import Partition
from lasp.parallel.loss import check_mean, global_mean
from lasp.parallel.shards import Unshard, part_of, positions, valid

if TYPE_CHECKING:
    from lasp.parallel.sequence_parallel import SequenceParallel

Across = Callable[[Partition, int, Group, StateExchange], Boundary]


class Sequence(Handle):
    """One batch: which tokens this rank holds, and the ops over the whole sequence. Immutable.

    Local tensors are [B, T_local, ...] in local order: the rank's units, ascending. B = 1 if documents are packed.
    """

    def __init__(self, parallel: "SequenceParallel", partition: Partition, packed: bool):
        self.parallel, self.partition, self.packed = parallel, partition, packed
        self._segments: dict[int, LocalSegments] = {}
        self._boundaries: dict[tuple[int, Across], Boundary] = {}
        offsets = zlib.crc32(array("q", partition.offsets).tobytes())
        self._identity = f"{partition.tokens} tokens, {partition.documents} documents ({offsets:x})"
        self._identity += f", {type(self).__name__} by {parallel.options}"

    @property
    def traced_facts(self) -> list[object]:
        return [self.partition.tokens, self.partition.local_tokens, self.packed]

    @property
    @traced(shapes.positions, lasting=True)
    def positions(self) -> Tensor:
        """[T_local] int64: each token's position within its document; 0 for padding."""
        return self._positions

    @property
    @traced(shapes.valid, lasting=True)
    def valid(self) -> Tensor:
        """[T_local] bool: False for padding."""
        return self._valid

    @cached_property
    @lasting
    def _positions(self) -> Tensor:
        return positions(self.partition, self.parallel.device)

    @cached_property
    @lasting
    def _valid(self) -> Tensor:
        return valid(self.partition, self.parallel.device)

    @traced(shapes.shard)
    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of x, which has `tokens` elements along `dim`, padded with zeros; differentiable. Sends
        nothing, so that what one rank gets wrong is a ValueError on that rank alone."""
        checks.require(x.shape[dim] == self.partition.tokens, "x", f"{x.shape[dim]} tokens", f"{self.partition.tokens}")
        return part_of(x, self.partition, dim)

    @traced(shapes.unshard)
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

    @traced(shapes.recurrence, casts=autocast.unify)
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
        across: Across = AcrossUnits if causal else AcrossDocuments
        inputs = partial(linear_inputs, q, k, v, decay, scale, causal)
        return self._recurrence("linear_attention", inputs, run_op, across, initial_state, output_final_state)

    @traced(shapes.recurrence, casts=autocast.unify)
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
        inputs = partial(delta_inputs, q, k, v, beta, decay, scale)
        return self._recurrence("delta_rule", inputs, run_op, AcrossUnits, initial_state, output_final_state)

    @traced(shapes.product, casts=autocast.unify)
    def delta_product(
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
        """`lasp.kernels.delta_product` over the whole sequence, with states as in `linear_attention`."""
        inputs = partial(delta_product_inputs, q, k, v, beta, decay, scale)
        return self._recurrence("delta_product", inputs, run_product, AcrossUnits, initial_state, output_final_state)

    @traced(shapes.log_linear, casts=autocast.unify)
    def log_linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        level_scales: Tensor,
        *,
        scale: float | None = None,
        initial_state: FenwickState | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, FenwickState | None]:
        """`lasp.kernels.log_linear_attention` over the whole sequence, which must be `aligned` over several ranks.

        States are as in `linear_attention`; all rows of a batch have seen as many tokens.
        """
        inputs = partial(log_linear_inputs, q, k, v, decay, level_scales, scale)
        return log_linear.attend(self, "log_linear_attention", inputs, initial_state, output_final_state)

    @traced(shapes.log_linear, casts=autocast.unify)
    def log_linear_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        decay: Tensor | None,
        level_scales: Tensor,
        *,
        scale: float | None = None,
        initial_state: FenwickState | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, FenwickState | None]:
        """`lasp.kernels.log_linear_delta_rule` over the whole sequence, as `log_linear_attention`."""
        inputs = partial(log_linear_delta_inputs, q, k, v, beta, decay, level_scales, scale)
        return log_linear.attend(self, "log_linear_delta_rule", inputs, initial_state, output_final_state)

    @apart
    def run(
        self,
        op: Op[Any],
        x: Inputs,
        *,
        across: Across = AcrossUnits,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Any op of two halves per direction (lasp.kernels.recurrence) over the whole sequence.

        Args:
            op: takes inputs of x's class; docs/architecture.md says what an op has to bring.
            x: its inputs, of this rank's tokens.
            across: what lies between the ranks: `AcrossUnits`, with another algebra than `Affine` if the op needs one.

        Returns:
            This rank's output, and the final states, as of `linear_attention`.
        """

        def run_it(x, boundary, *, initial_state, output_final_state):
            return run(op, boundary, x, initial_state, output_final_state)

        return self._recurrence(type(op).__name__, lambda: x, run_it, across, initial_state, output_final_state)

    @traced(like_output, reads=(0,), casts=autocast.cast)
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
        agreed = self._agree("softmax_attention", lambda: self._check_softmax(q, k, v, scale, causal, window))
        recurring = self.partition.unit_length if self.packed else 1
        mask = Mask(checks.softmax_scale(scale, q.shape[-1]), causal, window, recurring=recurring)
        return agreed.in_backward(self.parallel.softmax.attend(q, k, v, mask, self.partition))

    @traced(like_input)
    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`lasp.kernels.causal_conv1d` over the whole sequence: y [B, T_local, D].

        The gradients of weight and bias are this rank's part of a sum.
        """
        return whole(self._convolve("causal_conv1d", x, weight, bias, False, None))

    @traced(like_parts)
    def short_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, ...]:
        """`lasp.kernels.short_conv` over the whole sequence: a tensor [B, T_local, heads, size] of every part.

        The gradients of weight and bias are this rank's part of a sum.
        """
        return self._convolve("short_conv", x, weight, bias, True, parts)

    @traced(shapes.mean)
    def mean(self, loss_sum: Tensor, count: Tensor) -> Tensor:
        """The mean over the whole group, Σ loss_sum / Σ count, on every rank; backward gives each rank its gradient.

        loss_sum: scalar, this rank's sum. count: scalar, this rank's number of terms, or weight. 0 where there is none.
        """
        self._agree("mean", partial(check_mean, loss_sum, count))
        return global_mean(loss_sum, count, self.parallel.group)

    @traced(like_input)
    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, on every rank: for statistics of the whole sequence. No gradient goes through."""

        def check() -> dict:
            checks.tensor("x", x)
            return signature(x=x)

        self._agree("sum", check)
        return comm.all_reduce(x.detach(), self.parallel.group).wait()

    def _agree(self, method: str, check: Callable[[], dict]) -> Agreed:
        return agree_on_cpus(self.parallel.group, lambda: check() | {"sequence": self._identity}, call=method)

    def _recurrence(
        self,
        method: str,
        inputs: Callable[[], Inputs],
        run: Callable[..., tuple[Tensor, Tensor | None]],
        across: Across,
        initial_state: Tensor | None,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        made: list[Inputs] = []

        def check() -> dict:
            made.append(x := inputs())
            for tensor in x.per_token.values():
                self._check_tokens(tensor)
            self._require_past("initial_state", initial_state)
            checks.state(initial_state, (self._states(x.segments.batch), *x.state_shape[1:]), x.state_dtype, x.device)
            facts = x.options | {"output_final_state": bool(output_final_state)} | gradients(*x.tensors.values())
            facts |= signature(**x.tensors, initial_state=initial_state)
            facts["across"] = getattr(getattr(across, "func", across), "__name__", None)
            return facts | gradients(initial_state, of="initial_state")

        agreed = self._agree(method, check)
        (x,) = made
        local = self._local(x.segments.batch)
        folded = {name: local.fold(tensor) for name, tensor in x.per_token.items()}
        o, final_state = run(
            x.having(folded, local.segments),
            self._boundary(local.batch, across),
            initial_state=initial_state,
            output_final_state=output_final_state,
        )
        return local.unfold(agreed.in_backward(o, "final_state")), final_state

    def _convolve(
        self, method: str, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, parts: Parts | None
    ) -> tuple[Tensor, ...]:
        def check() -> dict:
            check_conv(x, weight, bias)
            if parts is not None:
                check_parts(x, parts)
            self._check_tokens(x)
            return signature(x=x, weight=weight, bias=bias) | gradients(x)

        agreed = self._agree(method, check)
        local, width = self._local(x.shape[0]), weight.shape[1]
        x, tail = self._tail(x, width) if width > 1 else (x, None)
        tail = agreed.in_backward(tail)
        results = convolve(local.fold(x), weight, bias, tail, local.segments, silu, parts or undivided(x))
        return tuple(local.unfold(y) for y in results)

    def _boundary(self, batch: int, across: Across) -> Boundary:
        if (alone := self._alone()) is not None:
            return alone
        if (batch, across) not in self._boundaries:
            made = across(*self._rows(batch), self.parallel.group, self.parallel.exchange)
            self._boundaries[batch, across] = made
        return self._boundaries[batch, across]

    def _alone(self) -> Boundary | None:
        """What lies in the place of other ranks if there is nobody to send to."""
        there = self.partition.layout.units == 1 and len(self.partition.local) == self.partition.documents
        return Alone() if there else None  # nor padding, of which nobody wants a state

    def _rows(self, batch: int) -> tuple[Partition, int]:
        """What a boundary lies in: a partition, and how many rows of it."""
        return self.partition, batch

    def _tail(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return fragment_tails(x, self.parallel.halo_plan(self.partition, width, x.device), self.partition, width)

    @lasting
    def _local(self, batch: int) -> LocalSegments:
        if batch not in self._segments:
            self._segments[batch] = LocalSegments(self.partition, batch)
        return self._segments[batch]

    def _unshard(self, local: Tensor, dim: int) -> Tensor:
        return Unshard.apply(local, self.partition, self.parallel.group, dim)

    def _states(self, batch: int) -> int:
        """How many initial and final states there are."""
        return batch * len(self._documents_with_states()[0])

    def _documents_with_states(self) -> tuple[Numbers[int], Numbers[int]]:
        """The documents of which there are initial and final states."""
        return (range(self.partition.documents),) * 2

    def _require_past(self, name: str, past: object | None) -> None:
        """Whether a past may, or has to, be given."""

    def _check_softmax(self, q, k, v, scale, causal, window) -> dict:
        check_softmax(q, k, v, causal, window)
        checks.require(k.shape[1] == q.shape[1], "k", f"{k.shape[1]} tokens", f"{q.shape[1]}, as q")
        self.parallel.softmax.check(q, k, self.partition)
        self._check_tokens(q)
        options = {"scale": checks.softmax_scale(scale, q.shape[-1]), "causal": causal, "window": window}
        return signature(q=q, k=k, v=v) | gradients(q, k, v) | options

    def _check_tokens(self, x: Tensor) -> None:
        expected = self.partition.local_tokens
        checks.require(x.shape[1] == expected, "tokens", x.shape[1], f"{expected}, this rank's share of the sequence")
        checks.require(x.shape[0] == 1 or not self.packed, "batch", x.shape[0], "1 for packed documents")


open_to_graphs(Sequence, "parallel", "partition", "packed")
