"""Numbers that a run watches: losses and gradients that are not finite, losses that leap, replicas that drift apart."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lasp.data import Numbered
from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.parallel.shards import local_part
from lasp.training.together import together

WINDOW, FEWEST = 128, 32  # of the last losses, that a loss is compared with; below FEWEST it is not
LEAP = 6.0  # standard deviations


class Spikes:
    """Losses that lie further above the median of those before than chance would have it.

    A normal distribution's standard deviation is 1.4826 times its median deviation, which a few outliers do not move.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def median_if_spike(self, loss: float) -> float | None:
        """The median of the last losses, if this next one is a spike; it then counts among the last ones."""
        last = list(self.losses)
        self.losses.append(loss)
        if len(last) < FEWEST:
            return None
        median = statistics.median(last)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in last)
        return median if loss > median + LEAP * deviation else None


def any_nonfinite(values: Tensor, group: Group) -> Tensor:
    """1.0 if one of the values is not finite on any rank, else 0.0: float32, on their device. Collective."""
    odd = (~values.isfinite().all()).float()
    return comm.all_reduce(odd, group).wait().clamp(max=1.0)


def find_nonfinite(
    model: nn.Module, rounds: Iterable[tuple[list[Numbered], Callable[[], Tensor]]], group: Group
) -> str:
    """Computes gradients again, some contexts at a time, and tells where what is not finite comes from. Collective.

    rounds: the contexts, and what gives their loss and leaves each rank's part of the gradient in the model.
    """
    for contexts, compute in rounds:
        model.zero_grad()
        loss = float(compute())
        found = together(group, lambda: _first_nonfinite_gradient(model))
        model.zero_grad()
        ranks = [rank for rank, place in enumerate(found) if place is not None]
        if ranks or not math.isfinite(loss):
            told = f"computed again, {name_contexts(contexts)} gave loss {loss}"
            if ranks:
                _, name = min(place for place in found if place is not None)
                told += f" and a gradient that is first not finite in {name}, on rank {', '.join(map(str, ranks))}"
            return told
    return "computed again, loss and gradients of each context were finite on every rank"


def name_contexts(contexts: list[Numbered]) -> str:
    """Their numbers, and their corpora if there are several; those of each follow one another."""
    numbers: dict[str | None, list[int]] = {}
    for context in contexts:
        numbers.setdefault(context.corpus, []).append(context.number)
    return " and ".join(
        (f"context {of[0]}" if len(of) == 1 else f"contexts {of[0]} to {of[-1]}") + (f" of {corpus}" if corpus else "")
        for corpus, of in numbers.items()
    )


def require_same_replicas(model: nn.Module, group: Group) -> None:
    """Raises RuntimeError on every rank unless tensors that several ranks hold have the same bits on all of them.

    They are compared by the exclusive or of their numbers' bits, which one other bit changes.
    """
    replicas = list(_replicas(model))
    if comm.size(group) == 1 or not replicas:
        return
    hashes = torch.stack([torch.hash_tensor(own).view(torch.int64) for _, _, own in replicas])
    parts = torch.tensor([part for _, part, _ in replicas], device=hashes.device)
    everybody = comm.replicate(torch.stack([parts, hashes]), group, "comparison of replicas").cpu()  # [R, 2, tensors]
    for index, (name, _, _) in enumerate(replicas):
        by_part: dict[int, dict[int, list[int]]] = {}
        for rank, (part, value) in enumerate(everybody[:, :, index].tolist()):
            by_part.setdefault(part, {}).setdefault(value, []).append(rank)
        for ranks in by_part.values():
            if len(ranks) > 1:
                told = ", ".join(
                    f"{value & (2**64 - 1):016x} on rank {', '.join(map(str, r))}" for value, r in ranks.items()
                )
                raise RuntimeError(f"{name}: got replicas of hash {told}, expected the same on all ranks that hold it")


def _first_nonfinite_gradient(model: nn.Module) -> tuple[int, str] | None:
    """Place and name of the first parameter whose gradient is not finite in this rank's part of it."""
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.grad is not None and not local_part(parameter.grad).isfinite().all():
            return place, name
    return None


def _replicas(model: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """Name, number of the part and this rank's tensor, of all that may lie on several ranks."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        part = 0
        if isinstance(tensor, DTensor):
            mesh, split = tensor.device_mesh, [not placement.is_replicate() for placement in tensor.placements]
            if all(split):
                continue
            for axis in (axis for axis, is_split in enumerate(split) if is_split):
                part = part * mesh.size(axis) + mesh.get_local_rank(axis)
        if (own := local_part(tensor.detach())).numel() > 0:
            yield name, part, own
