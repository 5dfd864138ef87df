"""The exchanges of states by themselves."""

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import SequenceParallel
from lasp.parallel.combine import combine, factors_of
from tests.parallel.inputs import F64, error

HEADS, K, V = 2, 5, 3
TRANSITIONS = {"none": None, "scalar": (HEADS,), "diagonal": (HEADS, K), "matrix": (HEADS, K, K)}


def draw(gen: torch.Generator, units: int, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states and transitions of all units."""
    states = torch.randn(units, 1, HEADS, K, V, generator=gen, dtype=F64)
    if TRANSITIONS[kind] is None:
        return states, None
    transitions = torch.randn(units, 1, *TRANSITIONS[kind], generator=gen, dtype=F64)
    return states, transitions / K**0.5 if kind == "matrix" else -transitions.abs()


@pytest.mark.mpi
@pytest.mark.parametrize("kind", TRANSITIONS)
@pytest.mark.parametrize("exchange", ["all_gather", "symmetric_memory"])
def test_one_may_start_before_another_has_been_waited_for(group: dist.ProcessGroup, gen, exchange: str, kind: str):
    parallel = SequenceParallel(group, layout="zigzag", state_exchange=exchange)
    layout, owned = parallel.layout, list(parallel.layout.owned(parallel.rank))
    breaks, wanted, started = (False,) * layout.units, [], []
    for _ in range(3):
        states, transitions = draw(gen, layout.units, kind)
        own = None if transitions is None else transitions[owned]
        wanted.append(combine(states, factors_of(transitions, states), breaks, owned, backward=False))
        started.append(parallel.exchange.forward(states[owned], own, breaks))
    got = [pending.wait()[0] for pending in reversed(started)]
    assert max(error(a, b) for a, b in zip(reversed(got), wanted, strict=True)) < 1e-10
