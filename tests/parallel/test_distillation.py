"""Both stages of a distillation over several ranks: losses and gradients are one rank's, sharded or not."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

from lasp.config import DataConfig
from lasp.distillation.config import StageConfig
from lasp.distillation.low_rank import adapt
from lasp.distillation.matching import Matching
from lasp.distillation.student import Student
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from lasp.parallel.apply import parallelize, reduce_gradients
from tests.parallel import test_model
from tests.parallel.inputs import generator

mesh = test_model.mesh
TOKENS = 43  # there is padding
DOCUMENTS = torch.tensor([0, 5, 31, 43])
SHAPE = replace(tiny("gla", "LN"), norm_eps=1e-2, init_std=0.2, value_head_dim=None, feature_map="hedgehog", window=6)
STAGE = StageConfig(
    model=SHAPE,
    data=DataConfig(train="a", valid="b"),
    run_dir="there",
    steps=1,
    context_length=TOKENS,
    stage="distill",
    rank=2,
    divergence=0.7,
    cross_entropy=0.3,
    temperature=2.0,
)


def build(stage: str) -> Decoder:
    """The same weights on every rank and in every call."""
    torch.manual_seed(0)
    teacher = Decoder(replace(SHAPE, pattern="N", feature_map=None, window=None)).double().requires_grad_(False)
    if stage == "match":
        matching = Matching(SHAPE).double()
        matching.follow(teacher)
        return matching
    student = Student(SHAPE).double()
    adapt(student, STAGE.rank)
    for parameter in student.parameters():
        if parameter.requires_grad:  # adapters, too, which begin as nothing
            parameter.data.add_(torch.randn(parameter.shape, generator=generator(1)) / 20)
    student.follow(teacher, STAGE)
    return student


def found(model, parallel, tokens, labels, mesh) -> tuple[float, dict[str, torch.Tensor]]:
    seq = parallel.sequence(TOKENS, DOCUMENTS)
    loss = seq.mean(*model(seq.shard(tokens), seq, labels=seq.shard(labels)))
    loss.backward()
    if mesh is not None:
        reduce_gradients(model, mesh)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


@pytest.mark.mpi
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("stage", ["match", "distill"])
def test_a_stage_is_one_ranks(gen, mesh, stage, fsdp):
    tokens = torch.randint(0, 64, (1, TOKENS), generator=gen)
    labels = torch.randint(0, 64, (1, TOKENS), generator=gen).where(torch.rand(1, TOKENS, generator=gen) < 0.8, -100)
    wanted, wanted_grads = found(build(stage), SequenceParallel(None), tokens, labels, None)
    world = mesh()
    parallel = SequenceParallel(world["sp"].get_group(), layout="zigzag")
    got, grads = found(parallelize(build(stage), world, fsdp=fsdp), parallel, tokens, labels, world)
    assert got == pytest.approx(wanted, rel=1e-9)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=1e-9 * grad.norm().item())
