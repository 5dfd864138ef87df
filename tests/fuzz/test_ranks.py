"""Any sequence over any ranks: operations, layouts, exchanges, documents and streams drawn by hypothesis, whose numbers
must be those of one rank. All ranks draw the same, since they have the same seed and all hear of each verdict.

    mpirun -n 3 python -m pytest --only-mpi --hypothesis-profile long tests/fuzz/test_ranks.py
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp.parallel import Sequence, SequenceParallel, Stream, comm
from lasp.parallel.layout import LAYOUTS
from lasp.parallel.softmax import STRATEGIES
from tests.parallel.inputs import F64, KINDS, Case, draw, error, generator, unsharded

TOLERANCE = 1e-10
EXCHANGES = ("auto", "all_gather", "ring", "scan")  # others make groups, or memory, of their own

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.ranks(3),
    pytest.mark.world,
    pytest.mark.cpu_only("NCCL groups do not make all ranks refuse bad input together"),
]


@dataclass(frozen=True)
class Drawn:
    """layout, exchange, softmax: of the ranks. seed: of the numbers. offsets: of documents, if packed."""

    layout: str
    exchange: str
    softmax: str
    tokens: int
    offsets: tuple[int, ...] | None
    batch: int
    seed: int

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.offsets is None else torch.tensor(self.offsets)

    @property
    def reasons(self) -> list[str]:
        """Why it may be refused."""
        heads = ["heads"] if self.softmax.startswith("ulysses") else []
        return heads + (["affine states alone"] if self.exchange in ("ring", "scan") else [])

    def normal(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """[batch, tokens, …] for each shape."""
        numbers = generator(self.seed)
        return [torch.randn(self.batch, self.tokens, *shape, generator=numbers, dtype=F64) for shape in shapes]


@st.composite
def sequences(draw: st.DrawFn) -> Drawn:
    tokens = draw(st.integers(1, 40))
    inner = draw(st.none() | st.lists(st.integers(0, tokens), max_size=4))
    return Drawn(
        layout=draw(st.sampled_from(LAYOUTS)),
        exchange=draw(st.sampled_from(EXCHANGES)),
        softmax=draw(st.sampled_from(sorted(STRATEGIES))),
        tokens=tokens,
        offsets=None if inner is None else (0, *sorted(inner), tokens),
        batch=1 if inner is not None else draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**32)),
    )


@pytest.fixture
def for_any(group: dist.ProcessGroup, run_seed: int):
    """Calls `values(parallel, case, …)` for one rank and for the group, for any case; both must be the same."""

    @cache
    def parallel(layout, state_exchange, softmax) -> SequenceParallel:
        return SequenceParallel(group, layout=layout, state_exchange=state_exchange, softmax=softmax)

    def check(values, *strategies) -> None:
        @settings(phases=[Phase.generate], database=None)
        @seed(run_seed)
        @given(st.tuples(sequences(), *strategies))
        def property_(drawn: tuple) -> None:
            case, *others = drawn
            wanted = values(SequenceParallel(None, layout=case.layout), case, *others)
            try:
                found = values(parallel(case.layout, case.exchange, case.softmax), case, *others)
            except ValueError as refused:
                assert any(words in str(refused) for words in case.reasons), refused
                return
            worst = max(error(found[name], wanted[name]) for name in wanted)
            of_all = comm.all_reduce(torch.tensor(int(not worst < TOLERANCE)), group).wait()
            assert of_all == 0, f"{worst} on this rank"

        property_()

    return check


def whole(seq: Sequence, o: Tensor, do: Tensor, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all tokens the output, and the gradient of every tensor."""
    grads = torch.autograd.grad(o, list(local.values()), seq.shard(do))
    return unsharded(seq, {"o": o.detach()} | dict(zip(local, grads, strict=True)))


def learning(seq: Sequence, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: seq.shard(x).requires_grad_() for name, x in tensors.items()}


def of_kind(case: Drawn, kind: str) -> Case:
    return draw(generator(case.seed), kind, case.tokens, case.offsets, case.batch, state=False)


def test_any_recurrence(for_any):
    def values(parallel: SequenceParallel, case: Drawn, kind: str) -> dict[str, Tensor]:
        seq, of = parallel.sequence(case.tokens, case.cu_seqlens), of_kind(case, kind)
        local = learning(seq, of.per_token)
        o, state = of.call(seq.linear_attention, seq.delta_rule, local, output_final_state=True)
        return whole(seq, o, of.do, local) | {"state": state.detach()}

    for_any(values, st.sampled_from(KINDS))


def test_any_log_linear_recurrence(for_any):
    def values(parallel: SequenceParallel, case: Drawn, delta: bool) -> dict[str, Tensor]:
        seq = parallel.sequence(case.tokens, case.cu_seqlens, aligned=True)
        of = of_kind(case, "gated delta")
        (levels,) = case.normal((2, 8))
        tensors = {name: x for name, x in of.per_token.items() if delta or name != "beta"} | {"level_scales": levels}
        local = learning(seq, tensors)
        o, _ = (seq.log_linear_delta_rule if delta else seq.log_linear_attention)(**local)
        return whole(seq, o, of.do, local)

    for_any(values, st.booleans())


def test_any_softmax_attention(for_any):
    def values(parallel: SequenceParallel, case: Drawn, heads: int, group: int, causal: bool, window) -> dict:
        seq = parallel.sequence(case.tokens, case.cu_seqlens)
        q, k, v, do = case.normal((heads * group, 4), (heads, 4), (heads, 3), (heads * group, 3))
        local = learning(seq, {"q": q, "k": k, "v": v})
        return whole(seq, seq.softmax_attention(**local, causal=causal, window=window), do, local)

    for_any(values, st.integers(1, 4), st.integers(1, 2), st.booleans(), st.none() | st.integers(1, 50))


def test_any_convolution(for_any):
    def values(parallel: SequenceParallel, case: Drawn, width: int) -> dict[str, Tensor]:
        seq = parallel.sequence(case.tokens, case.cu_seqlens)
        x, do = case.normal((3,), (3,))
        weight = torch.randn(3, width, generator=generator(case.seed), dtype=F64)
        local = learning(seq, {"x": x})
        return whole(seq, seq.causal_conv1d(local["x"], weight), do, local)

    for_any(values, st.integers(1, 6))


def test_any_stream(for_any):
    """Segment after segment, each with the state that the one before has left."""

    def values(parallel: SequenceParallel, case: Drawn, kind: str, length: int) -> dict[str, Tensor]:
        of = of_kind(case, kind)
        segment_tokens = max(length, parallel.layout.units) if parallel.size > 1 else case.tokens + 1
        segment_tokens = max(segment_tokens, parallel.layout.units)
        stream = Stream(parallel, case.tokens, segment_tokens, case.cu_seqlens)
        found: list[dict[str, Tensor]] = []
        state, outputs, leaves, upstream = None, [], [], []
        for segment, (start, stop) in zip(stream, stream.ranges, strict=True):
            local = learning(segment, {name: x[:, start:stop] for name, x in of.per_token.items()})
            options = {"initial_state": state if segment.past else None, "output_final_state": True}
            o, state = of.call(segment.linear_attention, segment.delta_rule, local, **options)
            outputs.append(o)
            leaves.append(local)
            upstream.append(segment.shard(of.do[:, start:stop]))
        flat = [x for local in leaves for x in local.values()]
        grads = iter(torch.autograd.grad(outputs, flat, upstream))
        for segment, o, local in zip(stream, outputs, leaves, strict=True):
            found.append(unsharded(segment, {"o": o.detach()} | {name: next(grads) for name in local}))
        assert state is not None
        return {name: torch.cat([each[name] for each in found], 1) for name in found[0]} | {"state": state.detach()}

    for_any(values, st.sampled_from([kind for kind in KINDS if kind != "not causal"]), st.integers(1, 30))
