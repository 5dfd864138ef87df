"""Several steps of the delta rule for each token, over ranks and in streams, against the definition in float64."""

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import SequenceParallel, Stream
from tests.parallel.inputs import error, unsharded
from tests.parallel.product import draw, expected


@pytest.mark.mpi
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, (0, 2, 2, 5, 23, 37)], ids=["", "packed"])
@pytest.mark.parametrize("decay", ["none", "scalar", "diagonal"])
def test_equals_the_definition(group: dist.ProcessGroup, gen, layout: str, documents, decay: str):
    case = draw(gen, decay, 2, 37, documents)
    sequence = SequenceParallel(group, layout=layout).sequence(37, case.offsets)
    local = {name: sequence.shard(x).clone().requires_grad_() for name, x in case.per_token.items()}
    state = case.state.clone().requires_grad_()
    o, final = sequence.delta_product(**local, initial_state=state, output_final_state=True)
    leaves = [*local.values(), state]
    *grads, d_state = torch.autograd.grad([o, final], leaves, [sequence.shard(case.do), case.d_final])
    parts = {"o": o.detach()} | {f"d{name}": d for name, d in zip(local, grads, strict=True)}
    got = unsharded(sequence, parts) | {"final": final.detach(), "dstate": d_state}
    found = {name: error(got[name], x) for name, x in expected(case).items()}
    assert max(found.values()) < 1e-10, found


@pytest.mark.mpi
@pytest.mark.ranks(2, 3)
def test_segments_go_on_from_each_other(group: dist.ProcessGroup, gen):
    case = draw(gen, "scalar", 3, 29)
    stream = Stream(SequenceParallel(group, layout="zigzag"), 29, 11)
    shares, state, parts = {name: stream.shard(x) for name, x in case.per_token.items()}, case.state, []
    for number, segment in enumerate(stream):
        local = {name: share[number] for name, share in shares.items()}
        o, state = segment.delta_product(**local, initial_state=state, output_final_state=True)
        parts.append(segment.unshard(o))
    wanted = expected(case)
    assert error(torch.cat(parts, 1), wanted["o"]) < 1e-10 and error(state, wanted["final"]) < 1e-10
