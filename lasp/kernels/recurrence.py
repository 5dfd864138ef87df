"""One autograd function for every op with a recurrent state, on one rank or many.

An op is two halves per direction; what lies between them is a `Boundary`: nothing on one rank, an exchange on many.

    forward    summarize       (A, S) of each segment
               boundary.enter  X, the state that comes in       -> finish
    backward   summarize_grad  D of each segment
               boundary.enter_grad  G, the gradient of the state that goes out       -> finish_grad
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.inputs import Inputs
from lasp.kernels.once import once
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.pending import Pending
from lasp.kernels.summary import Summary

Kept = tuple[Tensor | None, ...]
Given = TypeVar("Given", bound=Inputs, contravariant=True)
Finished = tuple[Tensor, Pending[Tensor], Kept]


class Gradients(NamedTuple):
    """Gradients of the inputs, by their names (None or nothing for one that has none), and, for whoever asks, of the
    state that came in ([N, H, K, V], through outputs and outgoing state)."""

    of: dict[str, Tensor | None]
    incoming: Pending[Tensor]


class Op(Protocol[Given]):
    """The four halves, for inputs of its class. `partial` passes between the two halves of one direction, `kept` from
    forward to backward.

    `wanted` says whether anybody looks at the summary: on one rank nobody does. The second halves wait for what comes
    in, exactly once, after whatever they can compute without it. States that are None are zero.
    """

    def summarize(self, x: Given, wanted: bool) -> tuple[Summary | None, Any]:
        """A and S of every segment: what others need to know, early and cheap."""

    def finish(self, x: Given, partial: Any, incoming: Pending[Tensor | None]) -> Finished:
        """o [B, T, H, V] and, for whoever asks, the outgoing states [N, H, K, V], given the incoming ones."""

    def summarize_grad(self, x: Given, kept: Kept, do: Tensor, wanted: bool) -> tuple[Tensor | None, Any]:
        """D [N, H, K, V]: the gradient of the incoming states through the outputs alone."""

    def finish_grad(self, x: Given, kept: Kept, partial: Any, d_outgoing: Pending[Tensor | None]) -> Gradients:
        """Everything else, given the gradient of the outgoing states."""


class Boundary(Protocol):
    """Where segments get their incoming states from, and to whom the outgoing ones go."""

    wants_summary: bool

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor | None, Kept]]:
        """Starts to find the incoming states [N, H, K, V], and what `enter_grad` will need."""

    def leave(self, outgoing: Tensor) -> Tensor:
        """The final states, from the outgoing states of the segments."""

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor | None]:
        """Starts to find the gradients of the outgoing states, from D and from the gradient of the final states."""

    def leave_grad(self, d_incoming: Tensor) -> Tensor:
        """The gradient of the initial states, from that of the incoming states."""


class Alone:
    """One rank: segments are whole sequences."""

    wants_summary = False

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor | None, Kept]]:
        return Pending(lambda: (initial_state, ()))

    def leave(self, outgoing: Tensor) -> Tensor:
        return outgoing

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor | None]:
        return Pending(lambda: d_final)

    def leave_grad(self, d_incoming: Tensor) -> Tensor:
        return d_incoming


def run(
    op: Op[Any], boundary: Boundary, x: Inputs, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V] in v's dtype and, if asked for, the final states."""
    first, *others = x.tensors.values()
    with torch.cuda.device_of(first):
        return _Recurrence.apply(op, boundary, x, output_final_state, initial_state, first, *others)


def _forward(
    op: Op, boundary: Boundary, x: Inputs, initial_state: Tensor | None, output_final_state: bool
) -> tuple[Tensor, Tensor | None, Kept, Kept]:
    """o, the final states if asked for, and what backward needs of the op and of the boundary."""
    summary, partial = op.summarize(x, boundary.wants_summary)
    links: list[Kept] = []

    def arrive(entered: tuple[Tensor | None, Kept]) -> Tensor | None:
        links.append(entered[1])
        return entered[0]

    o, outgoing, kept = op.finish(x, partial, boundary.enter(summary, initial_state).then(arrive))
    (link,) = links
    return o, boundary.leave(outgoing.wait()) if output_final_state else None, kept, link


class _Recurrence(Function):
    @staticmethod
    def forward(ctx, op, boundary, x, output_final_state, initial_state, *tensors):
        o, final, kept, link = once(lambda: _forward(op, boundary, x, initial_state, output_final_state))
        ctx.op, ctx.boundary, ctx.frame, ctx.names = op, boundary, x.without_tensors(), tuple(x.tensors)
        ctx.num_kept = len(kept)
        ctx.o, ctx.learns_initial_state = (o.shape, o.dtype), initial_state is not None and initial_state.requires_grad
        ctx.save_for_backward(*tensors, *kept, *link)
        ctx.set_materialize_grads(False)
        return o.detach(), None if final is None else final.detach()  # unlike views, to be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final):
        names, saved = ctx.names, ctx.saved_tensors
        tensors, rest = saved[: len(names)], saved[len(names) :]
        kept, link = rest[: ctx.num_kept], rest[ctx.num_kept :]
        x = ctx.frame.having(dict(zip(names, tensors, strict=True)))
        do = tensors[0].new_zeros(ctx.o[0], dtype=ctx.o[1]) if do is None else do.contiguous()
        d_summary, partial = ctx.op.summarize_grad(x, kept, do, ctx.boundary.wants_summary)
        arriving = ctx.boundary.enter_grad(link, d_summary, d_final)
        grads = ctx.op.finish_grad(x, kept, partial, arriving)
        d_initial = ctx.boundary.leave_grad(grads.incoming.wait()) if ctx.learns_initial_state else None
        return None, None, None, None, d_initial, *(grads.of.get(name) for name in names)
