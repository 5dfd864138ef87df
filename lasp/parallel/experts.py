"""Expert parallelism: each rank of a group holds some of the experts, and rows travel to theirs and back.

R ranks, E experts of which each rank holds E / R, N rows of this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.autocast import Function
from lasp.kernels.conv import like_input
from lasp.kernels.experts import RowOrder
from lasp.kernels.once_differentiable import once_differentiable
from lasp.kernels.traced import Opaque, traced
from lasp.parallel import comm
from lasp.parallel.agreement import agree_on_cpus, gradients
from lasp.parallel.comm import Group
from lasp.parallel.shards import local_part


class ExpertParallel:
    """Takes the place of `run(x, counts, *matrices)`, a function of one rank, for matrices sharded over the experts.

    group: rank r holds the r-th part of the experts, as DTensors or as tensors of its own. Every rank must make every
        call, be it without rows: all of them exchange the counts, then the rows, and the rows again in backward. The
        host reads the counts once per call. Ranks that differ in more than their rows are refused, on CPU groups.
    """

    def __init__(self, group: Group, run: Callable[..., Tensor]):
        self.group, self._spread = group, _Spread(group, run)

    def __call__(self, x: Tensor, counts: Tensor, *matrices: Tensor) -> Tensor:
        """x [N, D] in the experts' order, counts [E] rows for each expert, matrices [E, …] or [E / R, …] -> [N, D]."""
        return experts_over_ranks(self._spread, x, counts, [local_part(matrix) for matrix in matrices])


class _Spread(Opaque):
    def __init__(self, group: Group, run: Callable[..., Tensor]):
        self.group, self.run = group, run


@traced(like_input)
def experts_over_ranks(spread: _Spread, x: Tensor, counts: Tensor, own: list[Tensor]) -> Tensor:
    """`ExpertParallel` of matrices [E / R, …]."""
    group = spread.group

    def check() -> dict:
        facts = gradients(x, of="x") | gradients(*own, of="the matrices")
        return {"x": (x.dtype, x.shape[1]), "experts": len(counts)} | facts

    agreed = agree_on_cpus(group, check, call="experts")
    ranks = comm.size(group)
    here = len(counts) // ranks
    leaving = counts.view(ranks, here)
    arriving = comm.all_to_all(counts, [here] * ranks, [here] * ranks, group).wait().view(ranks, here)
    send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
    rows = _Exchange.apply(x, send, receive, group)
    experts = torch.arange(here, device=x.device).repeat(ranks)  # of the rows: by rank, then by expert
    by_expert = RowOrder.sorting(experts.repeat_interleave(arriving.flatten(), output_size=sum(receive)))
    y = spread.run(by_expert.apply(rows), arriving.sum(0), *own)
    return agreed.in_backward(_Exchange.apply(by_expert.undo(y), receive, send, group))


class _Exchange(Function):
    """send[r] rows of x go to rank r; receive[r] rows of it arrive. In backward their gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return comm.all_to_all(x, send, receive, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        return comm.all_to_all(d, ctx.receive, ctx.send, ctx.group).wait(), None, None, None
