"""Sequence-parallel softmax attention beside the same FLOPs by the kernel alone, forward and backward, causal, zigzag.

    torchrun --nproc-per-node 2 benchmarks/softmax.py --tokens 32768 131072     over two GPUs
    python benchmarks/softmax.py                                                2, 4 and 8 ranks emulated on one GPU
    python benchmarks/softmax.py --ranks 2 --tokens 131072 --no-accuracy        a longer one

"alone" is one call for the whole sequence with 1/R of the heads, which is what a rank of R would do at best; the others
are told in per cent of its speed. "packed" is 8 documents of uneven length, in --packed tokens over all ranks.

Emulated, everybody's keys and values are here already, and the rank with the most to do is timed: what is left is what
it costs to cut attention into blocks and to merge them, an upper bound for a ring that hides all transfers. Ulysses is
"alone" then. Errors are relative, by norm, against float64, with their ratio to those of the kernel in one call.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
import tyro
from clock import Clock
from ranks import join, say
from torch import Tensor

from lasp.kernels import softmax_attention
from lasp.kernels.blocks import Mask
from lasp.kernels.softmax import zeros_like
from lasp.parallel import SequenceParallel, leave
from lasp.parallel.layout import Layout, Partition
from lasp.parallel.softmax.op import AttendVisits
from lasp.parallel.softmax.plan import make_plan, pairs
from lasp.parallel.softmax.visits import Visit

DOCUMENTS = (6, 28, 3, 15, 9, 21, 2, 16)  # per cent
STEPS_BACK = 3.5  # FLOPs of forward and backward, times those of forward


@dataclass(frozen=True, kw_only=True)
class Settings:
    ranks: tuple[int, ...] = (2, 4, 8)  # to emulate; under torchrun those that are there
    tokens: tuple[int, ...] = (32768,)  # of each rank
    packed: int = 131072  # tokens of all ranks
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    runs: int = 5
    accuracy: bool = True
    accuracy_tokens: int = 32768  # of all ranks


@dataclass(frozen=True)
class Case:
    """Documents over all ranks' tokens, from 0 to their number."""

    offsets: list[int]
    ranks: int

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return torch.tensor(self.offsets) if len(self.offsets) > 2 else None

    def name(self) -> str:
        packed = f", {len(self.offsets) - 1} documents" if len(self.offsets) > 2 else ""
        return f"{self.ranks} ranks, {self.tokens // self.ranks} tokens each{packed}"

    def tflops(self, seconds: float, settings: Settings) -> float:
        seen = pairs(Partition(Layout("contiguous", 1), 0, self.offsets), 0, Mask(1.0))
        return STEPS_BACK * 4 * seen * settings.heads * settings.head_dim / self.ranks / seconds / 1e12


def packed(tokens: int) -> list[int]:
    return [0, *(tokens * share // 100 for share in accumulate(DOCUMENTS))]


def cases(ranks: int, settings: Settings) -> list[Case]:
    return [*(Case([0, tokens * ranks], ranks) for tokens in settings.tokens), Case(packed(settings.packed), ranks)]


def draw(
    tokens: int, settings: Settings, device: torch.device, ranks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do [1, T, H / ranks, D] in bf16."""
    heads = [settings.heads // ranks, settings.kv_heads // ranks, settings.kv_heads // ranks, settings.heads // ranks]
    q, k, v, do = (torch.randn(1, tokens, h, settings.head_dim, device=device).bfloat16() for h in heads)
    return q, k, v, do


def both(function: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], object]:
    *inputs, do = tensors
    leaves = [x.requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, do)


def alone(case: Case, settings: Settings, device: torch.device) -> Callable[[], object]:
    tensors = draw(case.tokens, settings, device, case.ranks)
    return both(lambda q, k, v: softmax_attention(q, k, v, cu_seqlens=case.cu_seqlens)[0], tensors)


@dataclass
class Emulation:
    """All ranks of one group in this process: each one's k, v, and the sums of their gradients.

    Their heads come in `shares`, as those of the all-gather do.
    """

    k: list[Tensor]
    v: list[Tensor]
    shares: int = 1
    dk: list[Tensor] = field(init=False)
    dv: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.dk, self.dv = ([zeros_like(x) for x in xs] for xs in (self.k, self.v))


class EmulatedVisits:
    """In place of a ring's or an all-gather's visits."""

    def __init__(self, k: Tensor, v: Tensor, rank: int, steps: list[int], group: Emulation):
        self.group, self.order = group, [(rank - step) % len(group.k) for step in steps]
        self.gradients = group.dk[rank], group.dv[rank]

    def forward(self) -> Iterator[Visit]:
        heads = self.group.k[0].shape[2]
        share = -(-heads // self.group.shares)
        for first in range(0, heads, share):
            part = slice(first, first + share)
            for rank in self.order:
                yield Visit(rank, part, self.group.k[rank][:, :, part], self.group.v[rank][:, :, part])

    def backward(self) -> Iterator[Visit]:
        for visit in self.forward():
            dk, dv = zeros_like(visit.k), zeros_like(visit.v)
            yield visit._replace(dk=dk, dv=dv)
            for total, part in ((self.group.dk, dk), (self.group.dv, dv)):
                total[visit.rank][:, :, visit.heads] += part


def emulate(case: Case, tensors: tuple[Tensor, ...], shares: int) -> tuple[Emulation, list[Callable[[], list[Tensor]]]]:
    """What every rank would do: a function that returns its o and dq, and adds to the sums."""
    partitions = [Partition(Layout("zigzag", case.ranks), rank, case.offsets) for rank in range(case.ranks)]
    mask = Mask(tensors[0].shape[-1] ** -0.5, recurring=1 if case.cu_seqlens is None else partitions[0].unit_length)
    local = [[torch.cat([x[:, a:b] for a, b in part.ranges], 1) for x in tensors] for part in partitions]
    group = Emulation([x[1] for x in local], [x[2] for x in local], shares)

    def run(rank: int) -> list[Tensor]:
        plan = make_plan(partitions[rank], mask)
        way = partial(EmulatedVisits, rank=rank, steps=plan.steps, group=group)
        q, k, v = (x.detach().requires_grad_() for x in local[rank][:3])
        o = AttendVisits.apply(q, k, v, mask, plan.blocks, way)
        return [o.detach(), torch.autograd.grad(o, (q, k, v), local[rank][3])[0]]

    return group, [partial(run, rank) for rank in range(case.ranks)]


def emulated_strategies(case: Case) -> dict[str, tuple[int, int]]:
    """With the ranks that exchange heads, and the shares of the heads of an all-gather."""
    strategies = {"ring": (1, 1), "all_gather": (1, 4)}
    return strategies | ({"ulysses_ring": (2, 1)} if case.ranks > 2 else {})


def busiest(case: Case) -> int:
    """The rank with the most pairs of queries and keys."""
    partition = Partition(Layout("zigzag", case.ranks), 0, case.offsets)
    return max(range(case.ranks), key=lambda rank: pairs(partition, rank, Mask(1.0)))


def report(case: Case, calls: dict[str, Callable[[], object]], settings: Settings, clock: Clock) -> None:
    """The first of the calls is what the others are compared with."""
    first_call = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        if clock.device.type == "cuda":
            torch.cuda.synchronize()
        first_call[name] = time.perf_counter() - start
    seconds = clock.medians(calls)
    say(f"{case.name()}{'':12}ms   TFLOP/s  % of alone   first call, s")
    for name, s in seconds.items():
        speed = 100 * next(iter(seconds.values())) / s
        say(f"  {name:28} {s * 1e3:10.2f} {case.tflops(s, settings):9.1f} {speed:11.1f} {first_call[name]:15.2f}")


def time_emulated(case: Case, settings: Settings, clock: Clock) -> None:
    calls = {"alone": alone(case, settings, clock.device)}
    for name, (inner, shares) in emulated_strategies(case).items():
        groups = Case(case.offsets, case.ranks // inner)
        ranks = emulate(groups, draw(case.tokens, settings, clock.device, inner), shares)[1]
        calls[name] = ranks[busiest(groups)]
    report(case, calls, settings, clock)


def time_real(case: Case, settings: Settings, clock: Clock) -> None:
    calls = {"alone": alone(case, settings, clock.device)}
    strategies = ["ring", "all_gather", "ulysses", *(["ulysses_ring"] if settings.kv_heads % case.ranks else [])]
    for name in strategies:
        parallel = SequenceParallel(dist.group.WORLD, layout="zigzag", softmax=name)
        sequence = parallel.sequence(case.tokens, case.cu_seqlens)
        tensors = draw(sequence.partition.local_tokens, settings, clock.device)
        calls[name] = both(sequence.softmax_attention, tensors)
    report(case, calls, settings, clock)


def accuracy(offsets: list[int], settings: Settings, device: torch.device) -> None:
    whole = Case(offsets, 1)
    tensors = draw(whole.tokens, settings, device)

    def one_call(xs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
        *inputs, do = xs
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = softmax_attention(*leaves, cu_seqlens=whole.cu_seqlens, backend=backend)[0]
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    exact = one_call(tuple(x.double() for x in tensors), "reference")

    def errors(found: list[Tensor]) -> list[float]:
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    kernel = errors(one_call(tensors, "auto"))
    documents = f"{len(offsets) - 1} documents" if len(offsets) > 2 else "one document"
    say(f"errors of o, dq, dk, dv (ratio to those of one call): {whole.tokens} tokens, {documents}")
    say(f"  {'one call':28}" + "".join(f"{e:17.2e}" for e in kernel))
    for ranks in settings.ranks:
        for name, (inner, shares) in emulated_strategies(Case(offsets, ranks)).items():
            groups, split = Case(offsets, ranks // inner), range(inner)
            by_heads = [emulated(groups, tuple(x.chunk(inner, 2)[part] for x in tensors), shares) for part in split]
            found = [torch.cat(parts, 2) for parts in zip(*by_heads, strict=True)]
            row = (f"{e:9.2e} ({e / own:4.2f})" for e, own in zip(errors(found), kernel, strict=True))
            say(f"  {f'{ranks} ranks, {name}':28}" + "".join(f"{text:>17}" for text in row))


def emulated(case: Case, tensors: tuple[Tensor, ...], shares: int) -> list[Tensor]:
    """o, dq, dk, dv of all ranks, in the order of the sequence."""
    group, ranks = emulate(case, tensors, shares)
    outputs, dq = zip(*(run() for run in ranks), strict=True)
    bounds = [Partition(Layout("zigzag", case.ranks), rank, case.offsets).ranges for rank in range(case.ranks)]
    place = torch.cat([torch.arange(a, b) for ranges in bounds for a, b in ranges]).argsort().to(tensors[0].device)
    dk, dv = ([x.bfloat16() for x in xs] for xs in (group.dk, group.dv))
    return [torch.cat(parts, 1)[:, place] for parts in (outputs, dq, dk, dv)]


def main(settings: Settings) -> None:
    cuda, together = torch.cuda.is_available(), dist.is_torchelastic_launched()
    device = join() if together else torch.device("cuda", 0) if cuda else torch.device("cpu")
    clock = Clock(device, settings.runs)
    machine = torch.cuda.get_device_name() if cuda else "CPU"
    heads = f"{settings.heads} heads and {settings.kv_heads} of keys and values, of {settings.head_dim}"
    say(f"{machine}, torch {torch.__version__}, {heads}, bf16, {'over' if together else 'emulated'} ranks")
    for ranks in (dist.get_world_size(),) if together else settings.ranks:
        for case in cases(ranks, settings):
            (time_real if together else time_emulated)(case, settings, clock)
    if settings.accuracy and not together:
        for offsets in ([0, settings.accuracy_tokens], packed(settings.accuracy_tokens)):
            accuracy(offsets, settings, device)
    if together:
        leave()


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
