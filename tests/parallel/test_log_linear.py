"""Sequence-parallel log-linear attention against the token-by-token definition, in float64."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

from lasp.kernels.fenwick import FenwickState
from lasp.kernels.reference.log_linear_recurrent import log_linear_recurrent
from lasp.parallel import SequenceParallel
from tests.kernels.log_linear import Drawn, draw, results
from tests.parallel.inputs import error, generator, unsharded

SHAPES = {  # tokens, and what else `draw` takes
    "divisible": (64, {"batch": 2, "seen": [5, 5]}),
    "odd": (37, {}),
    "shorter than the units": (3, {"batch": 2}),
    "documents": (37, {"offsets": [0, 2, 2, 5, 23, 37], "seen": [1, 0, 64, 7, 0]}),
    "a document over all ranks": (40, {"offsets": [0, 1, 39, 40]}),
}


@cache
def _case(seed: int, delta: bool, shape: str) -> tuple[Drawn, dict, dict]:
    """Inputs, gradients of the outputs, and what the definition makes of them."""
    tokens, options = SHAPES[shape]
    gen = generator(seed + list(SHAPES).index(shape) + 100 * delta)
    drawn, upstream = draw(gen, tokens, delta=delta, levels=8, **options), {}
    return drawn, upstream, results(gen, log_linear_recurrent, drawn, upstream, final=True)


def run(sequence, drawn: Drawn, upstream: dict) -> dict:
    """What the definition finds, on all ranks together; padding is filled with noise, which must change nothing."""
    leaves = {}
    for name, x in drawn.tensors.items():
        local = sequence.shard(x).clone()
        noise = torch.rand_like(local[:, ~sequence.valid])
        local[:, ~sequence.valid] = -noise if name == "decay" else noise
        leaves[name] = local.requires_grad_()
    state, inputs = drawn.state, list(leaves.values())
    if state is not None:
        state = FenwickState(state.slots.clone().requires_grad_(), state.tokens)
        inputs.append(state.slots)
    attend = sequence.log_linear_delta_rule if "beta" in leaves else sequence.log_linear_attention
    o, final = attend(**leaves, initial_state=state, output_final_state=True)
    grads = torch.autograd.grad([o, final.slots], inputs, [sequence.shard(upstream["o"]), upstream["final"]])
    local = {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=False)}
    whole = unsharded(sequence, local) | {"final": final.slots.detach()}
    return whole if state is None else whole | {"dslots": grads[-1]}


@pytest.mark.mpi
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delta", [False, True], ids=["gated", "delta"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_equals_the_definition(group: dist.ProcessGroup, run_seed: int, layout, delta, shape):
    drawn, upstream, wanted = _case(run_seed, delta, shape)
    offsets = drawn.cu_seqlens
    sequence = SequenceParallel(group, layout=layout).sequence(SHAPES[shape][0], offsets, aligned=True)
    got = run(sequence, drawn, upstream)
    found = {name: error(got[name], wanted[name]) for name in wanted}
    assert max(found.values()) < 1e-10, found


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.ranks(2, 3)
def test_bad_input_is_refused_on_every_rank(group: dist.ProcessGroup, gen):
    parallel = SequenceParallel(group)
    drawn = draw(gen, 41, levels=7)

    def attend(sequence, **changed):
        tensors = {name: sequence.shard(x) for name, x in (drawn.tensors | changed).items()}
        return lambda: sequence.log_linear_attention(**tensors)

    sequence = parallel.sequence(41, aligned=True)
    scales, decay = drawn.tensors["level_scales"], drawn.tensors["decay"]
    refused = {
        "6 levels, expected at least 7 for 41 tokens": attend(sequence, level_scales=scales[..., :6]),
        "decay: got a maximum of 1": attend(sequence, decay=torch.ones_like(decay)),
    }
    if parallel.size > 1:
        unaligned = parallel.sequence(41)
        length = unaligned.partition.unit_length
        refused[f"sequence: got units of {length} tokens, expected a power of two"] = attend(unaligned)
        ring = SequenceParallel(group, state_exchange="ring").sequence(41, aligned=True)
        refused["state_exchange: got Scan, which sends affine states alone"] = attend(ring)
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_one_rank(gen):
    for tokens, offsets in ((37, None), (37, [0, 5, 37])):
        drawn, upstream = draw(gen, tokens, offsets=offsets), {}
        wanted = results(gen, log_linear_recurrent, drawn, upstream, final=True)
        for aligned in (False, True):
            sequence = SequenceParallel(None).sequence(tokens, drawn.cu_seqlens, aligned=aligned)
            got = run(sequence, drawn, upstream)
            assert max(error(got[name], wanted[name]) for name in wanted) < 1e-10
