"""The exchanges of states by themselves, against `combine`."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel import SequenceParallel
from lasp.parallel.combine import Affine
from lasp.parallel.exchange.hierarchical import Hierarchical
from tests.parallel.inputs import F64, error

HEADS = 2
KINDS = ("none", "scalar", "diagonal", "matrix")
SIZES = {  # K, V, dtype, tolerance
    "odd": (5, 3, F64, 1e-10),
    "even": (36, 20, F64, 1e-10),
    "wide": (128, 36, torch.float32, 1e-5),
    "wider": (164, 17, torch.float32, 1e-5),
}


@dataclass(frozen=True)
class Draw:
    """The states and transitions of all units, and whether something passes through them."""

    states: Tensor
    transitions: Tensor | None
    breaks: tuple[bool, ...]

    def of(self, units: list[int]) -> tuple[Tensor, Tensor | None]:
        return self.states[units], None if self.transitions is None else self.transitions[units]

    def algebra(self, backward: bool = False) -> Affine:
        return Affine(self.breaks, backward)

    def combined(self, units: list[int], backward: bool = False) -> Tensor:
        states = self.states.double()
        transitions = None if self.transitions is None else self.transitions.double()
        algebra = self.algebra(backward)
        return algebra.combine(states, algebra.factors_of(transitions, states), units)


def draw(gen: torch.Generator, units: int, kind: str, size: str = "odd", batch: int = 1) -> Draw:
    key_dim, value_dim, dtype, _ = SIZES[size]

    def normal(*shape: int) -> Tensor:
        return torch.randn(units, batch, HEADS, *shape, generator=gen, dtype=F64).to(dtype)

    shape = {"none": None, "scalar": (), "diagonal": (key_dim,), "matrix": (key_dim, key_dim)}[kind]
    transitions = None if shape is None else normal(*shape)
    if transitions is not None:
        transitions = transitions / key_dim**0.5 if kind == "matrix" else -transitions.abs()
    breaks = (torch.rand(units, generator=gen, dtype=F64) < 0.15).tolist()
    return Draw(normal(key_dim, value_dim), transitions, tuple(breaks))


@pytest.mark.mpi
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", ["all_gather", "scan", "symmetric_memory"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_arrives(group: dist.ProcessGroup, gen, layout: str, exchange: str, kind: str, size: str):
    parallel = SequenceParallel(group, layout=layout, state_exchange=exchange)
    owned, found = list(parallel.layout.owned(parallel.rank)), {}
    for batch in (1, 2, 1):  # more calls than there are buffers
        case = draw(gen, parallel.layout.units, kind, size, batch)
        arrived, kept = parallel.exchange.forward(*case.of(owned), case.algebra()).wait()
        found[f"forward, batch {batch}"] = error(arrived.double(), case.combined(owned))
        arrived = parallel.exchange.backward(case.of(owned)[0], kept, case.algebra(backward=True)).wait()
        found[f"backward, batch {batch}"] = error(arrived.double(), case.combined(owned, backward=True))
    assert max(found.values()) < SIZES[size][-1], found


@pytest.mark.mpi
@pytest.mark.parametrize("size", ["odd", "even"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_arrives_from_other_nodes(group: dist.ProcessGroup, gen, layout: str, kind: str, size: str):
    """As if every run of `node` ranks were a machine; columns are shared by its ranks where they divide."""
    parallel = SequenceParallel(group, layout=layout)
    owned, found = list(parallel.layout.owned(parallel.rank)), {}
    for node in (n for n in range(1, parallel.size + 1) if parallel.size % n == 0):
        exchange = Hierarchical(parallel.layout, group, node, blocks=lambda size: 3)
        for batch in (1, 2):
            case = draw(gen, parallel.layout.units, kind, size, batch)
            arrived, kept = exchange.forward(*case.of(owned), case.algebra()).wait()
            found[f"forward, {node} ranks a node, batch {batch}"] = error(arrived, case.combined(owned))
            arrived = exchange.backward(case.of(owned)[0], kept, case.algebra(backward=True)).wait()
            found[f"backward, {node} ranks a node, batch {batch}"] = error(arrived, case.combined(owned, backward=True))
    assert max(found.values()) < SIZES[size][-1], found


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", ["all_gather", "symmetric_memory"])
def test_one_may_start_before_another_has_been_waited_for(group: dist.ProcessGroup, gen, exchange: str, kind: str):
    parallel = SequenceParallel(group, layout="zigzag", state_exchange=exchange)
    owned = list(parallel.layout.owned(parallel.rank))
    cases = [draw(gen, parallel.layout.units, kind) for _ in range(3)]
    started = [parallel.exchange.forward(*case.of(owned), case.algebra()) for case in cases]
    arrived = [pending.wait()[0] for pending in reversed(started)]
    assert max(error(a, case.combined(owned)) for a, case in zip(arrived, reversed(cases), strict=True)) < 1e-10


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", ["all_gather", "scan", "symmetric_memory"])
def test_graphs_replay_with_new_numbers(group: dist.ProcessGroup, gen, exchange: str, kind: str):
    parallel = SequenceParallel(group, layout="zigzag", state_exchange=exchange)
    if parallel.device.type == "cpu":
        pytest.skip("wants GPUs")
    owned, units = list(parallel.layout.owned(parallel.rank)), parallel.layout.units
    (states, transitions), breaks = draw(gen, units, kind).of(owned), (False,) * units

    def call() -> Tensor:
        arrived, kept = parallel.exchange.forward(states, transitions, Affine(breaks, backward=False)).wait()
        back = parallel.exchange.backward(states, kept, Affine(breaks, backward=True))
        return torch.stack([arrived, back.wait()])

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL looks at its streams from another thread
        replayed = call()
    for _ in range(3):
        case = draw(gen, units, kind)
        states.copy_(case.of(owned)[0])
        if transitions is not None:
            transitions.copy_(case.of(owned)[1])
        graph.replay()
        wanted = [Draw(case.states, case.transitions, breaks).combined(owned, back) for back in (False, True)]
        assert error(replayed, torch.stack(wanted)) < 1e-10
        assert torch.equal(call(), replayed)  # and not from the graph
