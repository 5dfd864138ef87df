"""Megatron models with lasp's layers: any mesh trains as one rank does, in fp32, with SGD, so that a wrong scale shows."""

from pathlib import Path

import megatron.core
import pytest
import torch

pytest.importorskip("megatron.core")

from lasp.integrations.megatron import run_on_cpu
from tests.integrations import megatron_models as models
from tests.integrations.megatron_models import Mesh

TOLERANCE = 1e-5
ALONE = Mesh()


@pytest.fixture(scope="module", autouse=True)
def cpu():
    run_on_cpu()


IS_019 = tuple(map(int, megatron.core.__version__.split(".")[:2])) >= (0, 19)
KINDS = {
    "gpt": models.gpt,
    "gpt-moe": lambda mesh, **changes: models.gpt(mesh, moe=True, **changes),
}
if IS_019:
    KINDS |= {"hybrid": models.hybrid, "hybrid-moe": lambda mesh, **changes: models.hybrid(mesh, moe=True, **changes)}
MESHES = [Mesh(cp=4), Mesh(tp=2, cp=2), Mesh(cp=2, pp=2), Mesh(tp=2, pp=2), Mesh(cp=2, ep=2), Mesh(tp=2, cp=2, ep=2)]


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_mesh_trains_as_one_rank(gen, shared_tmp_path, mesh, kind):
    if mesh.ep > 1 and "moe" not in kind:
        pytest.skip("has no experts")
    batches = models.draw_batches(gen)
    ALONE.enter()
    torch.manual_seed(0)
    alone = KINDS[kind](ALONE)
    models.save(alone, folder(shared_tmp_path, "before"))
    wanted, gradient = models.train_alone(alone, batches)

    mesh.enter()
    model = KINDS[kind](mesh)
    models.load(model, folder(shared_tmp_path, "before"))
    got = models.train_on_mesh(model, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    models.save(model, folder(shared_tmp_path, "gradient"))
    ALONE.enter()
    whole = KINDS[kind](ALONE)
    models.load(whole, folder(shared_tmp_path, "gradient"))
    errors = {name: p.detach() - gradient[name] for name, p in whole.named_parameters()}
    print(
        f"gradient: {total(errors) / total(gradient):.1e}",
        max((e.norm() / gradient[n].norm(), n) for n, e in errors.items()),
    )
    assert got == pytest.approx(wanted, rel=TOLERANCE)
    for name, error in errors.items():
        assert error.norm() <= 10 * TOLERANCE * gradient[name].norm(), name
    assert total(errors) <= TOLERANCE * total(gradient)


def total(gradient: dict[str, torch.Tensor]) -> float:
    return torch.nn.utils.get_total_norm(gradient.values()).item()


def folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir(exist_ok=True)
    return path
