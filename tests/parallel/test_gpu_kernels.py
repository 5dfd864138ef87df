"""The Triton kernels over several GPUs, in bf16, against the same kernels on one."""

import pytest
import torch
import torch.distributed as dist

from lasp.kernels import delta_rule, linear_attention, log_linear_attention, log_linear_delta_rule
from lasp.parallel import SequenceParallel
from tests.parallel.inputs import error

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="without a GPU these kernels run in the interpreter alone"
    ),
]
TOKENS, Q_HEADS, HEADS, SIZE = 5000, 2, 4, 128
OFFSETS = [0, 3, 1700, 4200, TOKENS]
DECAYS = {"none": (), "constant": (HEADS,), "scalar": (1, TOKENS, HEADS), "vector": (1, TOKENS, HEADS, SIZE)}


DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one sequence", "documents"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])


def draw(gen, op, decay=()):
    def normal(heads):
        return torch.randn(1, TOKENS, heads, SIZE, generator=gen, device="cuda")

    inputs = {
        "q": normal(Q_HEADS),
        "k": torch.nn.functional.normalize(normal(Q_HEADS), dim=-1),
        "v": normal(HEADS),
    }
    if "delta_rule" in op:
        inputs["beta"] = torch.rand(1, TOKENS, HEADS, generator=gen, device="cuda")
    inputs = {name: x.bfloat16() for name, x in inputs.items()}
    if decay:
        inputs["decay"] = -2e-3 * torch.rand(decay, generator=gen, device="cuda")
    return inputs, normal(HEADS).bfloat16()


def check(op, alone, inputs, do, offsets, sequence):
    """The sequence's method against the function on one GPU."""

    def run(function, split, **options):
        leaves = {name: split(x).clone().requires_grad_() for name, x in inputs.items() if x.ndim > 1}
        constant = {name: x for name, x in inputs.items() if x.ndim == 1}
        o, _ = function(**leaves, **constant, **options)
        return dict(zip(("o", *leaves), (o, *torch.autograd.grad(o, list(leaves.values()), split(do))), strict=True))

    wanted = run(alone, lambda x: x, cu_seqlens=offsets)
    for name, x in run(getattr(sequence, op), sequence.shard).items():
        bound = 5e-2 if name == "decay" else 1e-2  # both are rounded; parts move the borders of chunks
        assert error(sequence.unshard(x.detach()).double(), wanted[name].detach().double()) < bound, name


@DOCUMENTS
@pytest.mark.parametrize("exchange", ["all_gather", "symmetric_memory"])
@LAYOUTS
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("op", ["linear_attention", "delta_rule"])
def test_equal_one_gpu(op, decay, layout, exchange, documents):
    inputs, do = draw(torch.Generator("cuda").manual_seed(1), op, DECAYS[decay])
    offsets = torch.tensor(OFFSETS, device="cuda") if documents else None
    sequence = SequenceParallel(dist.group.WORLD, layout=layout, state_exchange=exchange).sequence(TOKENS, offsets)
    alone = {"linear_attention": linear_attention, "delta_rule": delta_rule}[op]
    check(op, alone, inputs, do, offsets, sequence)


@DOCUMENTS
@LAYOUTS
@pytest.mark.parametrize("op", ["log_linear_attention", "log_linear_delta_rule"])
def test_log_linear_equals_one_gpu(op, layout, documents):
    gen = torch.Generator("cuda").manual_seed(1)
    inputs, do = draw(gen, op, DECAYS["scalar"])
    inputs["level_scales"] = torch.rand(1, TOKENS, HEADS, TOKENS.bit_length() + 1, generator=gen, device="cuda")
    offsets = torch.tensor(OFFSETS, device="cuda") if documents else None
    sequence = SequenceParallel(dist.group.WORLD, layout=layout).sequence(TOKENS, offsets, aligned=True)
    alone = {"log_linear_attention": log_linear_attention, "log_linear_delta_rule": log_linear_delta_rule}[op]
    check(op, alone, inputs, do, offsets, sequence)
