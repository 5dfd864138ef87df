"""A mixer and a model of one's own, those of the documentation, give over several ranks what they give on one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lasp.models import make_model
from lasp.parallel import SequenceParallel, parallelize, reduce_gradients
from tests.parallel.inputs import error
from tests.parallel.test_model import config

TOKENS, DOCUMENTS = 53, (0, 3, 20, 53)
OWN = {"mixer": "examples.own_mixer:ForgettingMixer", "model_class": "examples.own_model:Model"}


def gradients(shape, group, mesh, text):
    torch.manual_seed(0)
    model = make_model(shape).double()
    if mesh is not None:
        parallelize(model, mesh)
    seq = SequenceParallel(group, layout="zigzag").sequence(TOKENS, torch.tensor(DOCUMENTS))
    labels = seq.shard(text[:, 1:]).masked_fill(~seq.valid, -100)
    loss = seq.mean(*model(seq.shard(text[:, :-1]), seq, labels=labels))
    loss.backward()
    if mesh is not None:
        reduce_gradients(model, mesh)
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.mpi
@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("field", OWN)
def test_own_code_over_ranks_is_that_on_one(gen, field):
    shape = replace(config("gla"), **{field: OWN[field]})
    text = torch.randint(31, (1, TOKENS + 1), generator=gen)
    device = torch.get_default_device().type
    mesh = init_device_mesh(device, (1, dist.get_world_size()), mesh_dim_names=("dp", "sp"))
    alone = gradients(shape, None, None, text)
    together = gradients(shape, dist.group.WORLD, mesh, text)
    for mine, expected in zip(together, alone, strict=True):
        assert error(mine, expected) < 1e-10
