"""Sequence-parallel linear attention and delta rule against the token-by-token definition, in float64."""

import shutil
from dataclasses import replace
from functools import cache, partial, partialmethod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.linear import run_op
from lasp.parallel import SequenceParallel
from lasp.parallel.cost import Costs, Link, Links
from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.exchange.scan import Scan
from lasp.parallel.exchange.symmetric_memory import SymmetricMemory
from tests.parallel.inputs import KINDS, Case, draw, error, expected, generator, share_of_the_past, unsharded

TOLERANCE = 1e-10
SHAPES = {  # tokens, document offsets, batch, whether there is an initial state
    "divisible": (48, None, 2, True),
    "odd": (37, None, 1, False),
    "shorter than the units": (3, None, 2, True),
    "one token": (1, None, 1, True),
    "documents": (37, (0, 2, 2, 5, 23, 37), 1, True),
    "a document over all ranks": (40, (0, 1, 39, 40), 1, False),
    "a document that ends with a unit of 12": (48, (0, 24, 48), 1, True),
    "a document that ends with a unit of 16": (48, (0, 32, 48), 1, True),
}


EXCHANGES = ("all_gather", "ring", "scan", "symmetric_memory")


@cache
def _case(seed: int, kind: str, shape: str) -> tuple[Case, dict[str, Tensor]]:
    tokens, documents, batch, state = SHAPES[shape]
    gen = generator(seed + 1000 * KINDS.index(kind) + list(SHAPES).index(shape))
    case = draw(gen, kind, tokens, documents, batch, state)
    return case, expected(case)


def run(parallel: SequenceParallel, case: Case) -> dict[str, Tensor]:
    """What `expected` computes, on all ranks together; padding is filled with noise, which must change nothing."""
    sequence = parallel.sequence(case.v.shape[1], case.cu_seqlens)
    padding = ~sequence.valid
    leaves = {}
    for name, x in case.per_token.items():
        local = sequence.shard(x).clone()
        noise = -torch.rand_like(local[:, padding]) if name == "decay" else torch.rand_like(local[:, padding])
        local[:, padding] = noise
        leaves[name] = local.requires_grad_()
    initial_state = None if case.initial_state is None else case.initial_state.clone().requires_grad_()
    o, final_state = case.call(
        sequence.linear_attention,
        sequence.delta_rule,
        leaves,
        initial_state=initial_state,
        output_final_state=True,
    )
    wanted = list(leaves.values()) + ([] if initial_state is None else [initial_state])
    grads = torch.autograd.grad([o, final_state], wanted, [sequence.shard(case.do), case.d_final])
    local = {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=False)}
    whole = unsharded(sequence, local) | {"final_state": final_state.detach()}
    return whole if initial_state is None else whole | {"dinitial_state": grads[-1]}


def made(group: dist.ProcessGroup, layout: str, exchange: str) -> SequenceParallel:
    """As users make it, but that small states, too, are scanned in several blocks (of unequal size)."""
    parallel = SequenceParallel(group, layout=layout, state_exchange=exchange)
    if exchange == "scan":
        parallel.exchange = Scan(parallel.layout, group, blocks=lambda size: 4)
    compiler = "c++" if parallel.device.type == "cpu" else "nvcc"
    if exchange == "symmetric_memory" and parallel.size > 1 and shutil.which(compiler) and shutil.which("ninja"):
        assert isinstance(parallel.exchange, SymmetricMemory)
    return parallel


def errors(parallel: SequenceParallel, seed: int, kind: str) -> dict[str, float]:
    """The largest error of each shape's outputs, states and gradients."""
    found = {}
    for shape in SHAPES:
        case, wanted = _case(seed, kind, shape)
        got = run(parallel, case)
        assert got.keys() == wanted.keys()
        for name in wanted:
            found[f"{shape}: {name}"] = error(got[name], wanted[name])
    return found


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "exchange",  # of three ranks' subgroups some have two
    [pytest.param(name, marks=pytest.mark.ranks(*((3, 4) if name == "all_gather" else (3,)))) for name in EXCHANGES],
)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_equals_the_definition(group: dist.ProcessGroup, run_seed: int, layout: str, exchange: str, kind: str):
    found = errors(made(group, layout, exchange), run_seed, kind)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.ranks(3)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_subgroups_equal_the_definition(ranks, run_seed: int, exchange: str, layout: str):
    """Rank and group rank differ there, which is nothing to any kind."""
    found = errors(made(ranks.groups["subgroup"], layout, exchange), run_seed, "gated delta")
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.world
@pytest.mark.ranks(3)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_gates_that_are_shut(group: dist.ProcessGroup, gen: torch.Generator, exchange: str):
    """Of one head anywhere, so that whole units forget what enters them; through the other the past is seen."""
    parallel, found = made(group, "zigzag", exchange), {}
    for kind in ("constant", "scalar", "diagonal", "gated delta", "diagonal delta"):
        for shape in ("divisible", "documents"):
            tokens, documents, batch, state = SHAPES[shape]
            case = draw(gen, kind, tokens, documents, batch, state)
            decay = case.decay.clone()
            if kind == "constant":
                decay[0] = -torch.inf
            else:
                shut = torch.rand(decay.shape[:2], generator=gen) < 0.2
                decay[:, :, 0][shut] = -torch.inf
            case = replace(case, decay=decay)
            got = run(parallel, case)
            found |= {f"{kind}, {shape}: {name}": error(got[name], x) for name, x in expected(case).items()}
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_no_sequences_at_all(group: dist.ProcessGroup, gen: torch.Generator, exchange: str):
    parallel = made(group, "zigzag", exchange)
    for kind in KINDS:
        got = run(parallel, draw(gen, kind, 37, batch=0))
        assert all(x.shape[0] == 0 for x in got.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank_in_units_of_a_power_of_two(run_seed: int, monkeypatch, layout: str, kind: str):
    """Padding has no state of its own."""
    monkeypatch.setattr(SequenceParallel, "sequence", partialmethod(SequenceParallel.sequence, aligned=True))
    found = errors(SequenceParallel(None, layout=layout), run_seed, kind)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_rank_equals_the_definition(run_seed: int, layout: str, kind: str):
    found = errors(SequenceParallel(None, layout=layout), run_seed, kind)
    assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.ranks(2)
@pytest.mark.cpu_only("there Triton's kernels take no keys that are so small")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not causal"])
@pytest.mark.parametrize("documents", [None, (0, 2, 2, 90, 310, 320)], ids=["", "packed"])
def test_kernels_equal_the_definition(
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    run_seed: int,
    documents: tuple[int, ...] | None,
    kind: str,
):
    """Triton's, in fp32, where units have several tiles."""
    tiles, delta = (pytest.importorskip(f"lasp.kernels.triton.{name}") for name in ("shared.tiles", "delta.op"))
    monkeypatch.setattr("lasp.parallel.sequence.run_op", partial(run_op, backend="triton"))
    monkeypatch.setattr(tiles, "LONGEST_TILE", 64)
    monkeypatch.setattr(delta, "SHORTEST_TILE", 64)
    monkeypatch.setattr(delta, "multiprocessors", lambda device: 64)
    case = draw(generator(run_seed), kind, 320, documents)
    wanted = expected(case)
    single = {name: x.float() for name, x in vars(case).items() if isinstance(x, Tensor) and x.is_floating_point()}
    got = run(made(group, "zigzag", "all_gather"), replace(case, **single))
    found = {name: error(got[name].double(), wanted[name]) for name in wanted}
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_show_the_far_past(run_seed: int, kind: str):
    """With eight units (four ranks, zigzag), what the last one computes depends visibly on what lies behind others."""
    case, _ = _case(run_seed, kind, "divisible")
    assert share_of_the_past(case, units=8, distance=1) > 0.2
    assert share_of_the_past(case, units=8, distance=2) > 0.1


@pytest.mark.mpi
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_repeated_runs_give_the_same_bits(group: dist.ProcessGroup, run_seed: int, exchange: str):
    parallel = made(group, "zigzag", exchange)
    case, wanted = _case(run_seed, "gated delta", "documents")
    first, *others = (run(parallel, case) for _ in range(4))  # more than there are buffers
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert max(error(first[name], wanted[name]) for name in wanted) < TOLERANCE


@pytest.mark.mpi
@pytest.mark.ranks(3)
def test_auto_takes_the_cheapest_for_each_size(group: dist.ProcessGroup, run_seed: int):
    """Here with costs that make small states all-gather and larger ones scan, or the other way round."""
    slow, fast = Link(1.0, 1e9), Link(1e-3, 1e2)
    parallel = made(group, "zigzag", "all_gather")
    scan = made(group, "zigzag", "scan").exchange
    for links in (Links(slow, fast), Links(fast, slow)):
        parallel.exchange = Auto(
            {"all_gather": AllGather(parallel.layout, group), "scan": scan},
            Costs(links, links),
            parallel.size,
            parallel.size,
        )
        found = errors(parallel, run_seed, "gated delta")
        assert max(found.values()) < TOLERANCE, {name: e for name, e in found.items() if e >= TOLERANCE}


@pytest.mark.mpi
@pytest.mark.ranks(2)
def test_compiled_models_may_contain_it(group: dist.ProcessGroup, run_seed: int):
    """One graph with the op as a node of it, compiled once, for all batches."""
    case, wanted = _case(run_seed, "gated delta", "divisible")
    parallel = made(group, "zigzag", "all_gather")
    torch._dynamo.reset()

    def layer(sequence, v: Tensor, **others: Tensor) -> Tensor:
        return 2 * sequence.delta_rule(v=3 * v, initial_state=3 * case.initial_state, **others)[0]

    compiled, graphs = torch.compile(layer, backend="aot_eager", fullgraph=True), []
    for _ in range(3):
        sequence = parallel.sequence(case.v.shape[1])
        local = {name: sequence.shard(x).requires_grad_() for name, x in case.per_token.items()}
        outputs = [function(sequence, **local) for function in (layer, compiled)]
        assert error(sequence.unshard(outputs[1].detach()), 6 * wanted["o"]) < TOLERANCE
        grads = [torch.autograd.grad(o, list(local.values()), sequence.shard(case.do)) for o in outputs]
        assert all(error(b, a) < TOLERANCE for a, b in zip(*grads, strict=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[0] == graphs[-1]
