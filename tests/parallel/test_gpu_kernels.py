"""The Triton kernels over several GPUs, in bf16, against the same kernels on one."""

import pytest
import torch
import torch.distributed as dist

from lasp.kernels import delta_rule, linear_attention
from lasp.parallel import SequenceParallel
from tests.parallel.inputs import error

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="without a GPU these kernels run in the interpreter alone"
    ),
]
TOKENS, Q_HEADS, HEADS, SIZE = 5000, 2, 4, 128
DECAYS = {"none": (), "constant": (HEADS,), "scalar": (1, TOKENS, HEADS), "vector": (1, TOKENS, HEADS, SIZE)}


@pytest.mark.parametrize("documents", [False, True], ids=["one sequence", "documents"])
@pytest.mark.parametrize("exchange", ["all_gather", "symmetric_memory"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_equal_one_gpu(op, decay, layout, exchange, documents):
    gen = torch.Generator("cuda").manual_seed(1)

    def normal(heads):
        return torch.randn(1, TOKENS, heads, SIZE, generator=gen, device="cuda")

    inputs = {
        "q": normal(Q_HEADS),
        "k": torch.nn.functional.normalize(normal(Q_HEADS), dim=-1),
        "v": normal(HEADS),
    }
    if op == "delta_rule":
        inputs["beta"] = torch.rand(1, TOKENS, HEADS, generator=gen, device="cuda")
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    if DECAYS[decay]:
        inputs["decay"] = -2e-3 * torch.rand(DECAYS[decay], generator=gen, device="cuda")
    do = normal(HEADS).bfloat16()
    offsets = torch.tensor([0, 3, 1700, 4200, TOKENS], device="cuda") if documents else None
    sequence = SequenceParallel(dist.group.WORLD, layout=layout, state_exchange=exchange).sequence(TOKENS, offsets)

    def run(function, split, **options):
        leaves = {name: split(x).clone().requires_grad_() for name, x in inputs.items() if x.ndim > 1}
        constant = {name: x for name, x in inputs.items() if x.ndim == 1}
        o, _ = function(**leaves, **constant, **options)
        return dict(zip(("o", *leaves), (o, *torch.autograd.grad(o, list(leaves.values()), split(do))), strict=True))

    alone = run({"linear_attention": linear_attention, "delta_rule": delta_rule}[op], lambda x: x, cu_seqlens=offsets)
    found = run(getattr(sequence, op), sequence.shard)
    for name, x in found.items():
        bound = 5e-2 if name == "decay" else 1e-2  # both are rounded; parts move the borders of chunks
        assert error(sequence.unshard(x.detach()).double(), alone[name].detach().double()) < bound, name
