"""Megatron models with lasp's layers train on any mesh as on one rank: in fp32, with SGD, so that a wrong scale shows.

Every mesh starts from one checkpoint that a single rank wrote and writes its last gradient as a checkpoint, so that
resharding in both directions is part of it. All meshes of 4 ranks, and those that need 8 or 16:

    for n in 4 8 16; do mpirun --oversubscribe -n $n python -m pytest --only-mpi --all-meshes \\
        tests/integrations/test_megatron_parallel.py; done
"""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

megatron = pytest.importorskip("megatron.core")

from tests.integrations import megatron_models as models
from tests.integrations.megatron_models import ALONE, Mesh

TOLERANCE = 1e-5
KINDS = ["gpt", "gpt-moe", "hybrid", "hybrid-moe"]
EVERY_MESH = [Mesh(tp, cp, pp, ep) for cp, tp, ep, pp in product((1, 2, 4), (1, 2), (1, 2), (1, 2))]
FEW = {
    "gpt": [Mesh(cp=4), Mesh(tp=2, cp=2), Mesh(cp=2, pp=2)],
    "gpt-moe": [Mesh(tp=2, cp=2, ep=2), Mesh(cp=2, ep=2)],
    "hybrid": [Mesh(tp=2, pp=2), Mesh(cp=2)],
    "hybrid-moe": [Mesh(cp=2, pp=2), Mesh(tp=2, cp=2, ep=2)],
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mesh" in metafunc.fixturenames:
        chosen = dict.fromkeys(KINDS, EVERY_MESH) if metafunc.config.getoption("all_meshes") else FEW
        cases = [(kind, mesh) for kind in KINDS for mesh in chosen[kind] if mesh.ep == 1 or "moe" in kind]
        metafunc.parametrize(("alone", "mesh"), cases, indirect=["alone"], ids=lambda x: str(x), scope="module")


def build(kind: str, mesh: Mesh, **changes):
    make = models.hybrid if "hybrid" in kind else models.gpt
    return make(mesh, moe="moe" in kind, **changes)


def build_on_mesh(kind: str, mesh: Mesh, **changes):
    """With experts that are computed together where they can be; `alone` has Megatron's own."""
    return build(kind, mesh, moe_grouped_gemm="moe" in kind and mesh.etp == 1, **changes)


@pytest.fixture(scope="module")
def alone(request, ranks, run_seed, tmp_path_factory) -> SimpleNamespace:
    """One rank's training of a kind of model: checkpoints of the weights before it and of the last gradient."""
    kind = request.param
    if "hybrid" in kind and megatron.__version__ < "0.19":
        pytest.skip("megatron-core has no HybridModel")
    folder = Path(ranks.broadcast(f"{kind} folder", str(tmp_path_factory.mktemp(kind))))
    batches = models.draw_batches(torch.Generator().manual_seed(run_seed))
    ALONE.enter()
    torch.manual_seed(run_seed)
    model = build(kind, ALONE)
    models.save(model, folder / "weights")
    losses = models.train_alone(model, batches)
    models.save_gradient(model, folder / "gradient")
    return SimpleNamespace(kind=kind, folder=folder, batches=batches, losses=losses)


@pytest.mark.mpi
def test_mesh_trains_as_one_rank(ranks, alone, mesh, shared_tmp_path):
    copies, rest = divmod(ranks.size, mesh.ranks)
    if rest or copies > models.SEQUENCES or copies * mesh.tp * mesh.cp % mesh.ep:
        pytest.skip(f"{mesh} wants another number of ranks")
    mesh.enter()
    model = build_on_mesh(alone.kind, mesh)
    models.load(model, alone.folder / "weights")
    losses = models.train_on_mesh(model, alone.batches)
    models.save_gradient(model, shared_tmp_path / "gradient")
    assert losses == pytest.approx(alone.losses, rel=TOLERANCE)
    models.check_gradient(shared_tmp_path / "gradient", alone.folder / "gradient", TOLERANCE)


VARIANTS = {
    "full recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective recompute": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "averages": {"calculate_per_token_loss": False},
}


@pytest.mark.mpi
@pytest.mark.parametrize("alone", ["gpt"], indirect=True, scope="module")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_as_one_rank(ranks, alone, variant, shared_tmp_path):
    """Recomputation repeats the exchanges; with averaged losses Megatron multiplies by CP, and divides by it later."""
    if ranks.size != 4:
        pytest.skip("wants 4 ranks")
    mesh = Mesh(tp=2, cp=2)
    mesh.enter()
    model = build(alone.kind, mesh, **VARIANTS[variant])
    models.load(model, alone.folder / "weights")
    losses = models.train_on_mesh(model, alone.batches)
    models.save_gradient(model, shared_tmp_path / "gradient")
    assert losses == pytest.approx(alone.losses, rel=TOLERANCE)
    models.check_gradient(shared_tmp_path / "gradient", alone.folder / "gradient", TOLERANCE)


@pytest.mark.mpi
@pytest.mark.parametrize("alone", ["gpt"], indirect=True, scope="module")
def test_distributed_optimizer_takes_the_same_steps(ranks, alone):
    """Adam, the only one that Megatron distributes; the losses of the later steps show the updates."""
    if ranks.size != 4:
        pytest.skip("wants 4 ranks")
    mesh = Mesh(cp=2)
    mesh.enter()
    losses = []
    for distributed in (False, True):
        model = build(alone.kind, mesh)
        models.load(model, alone.folder / "weights")
        losses.append(models.train_on_mesh(model, alone.batches, "adam", distributed))
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert losses[0][0] == pytest.approx(alone.losses[0], rel=TOLERANCE)
    assert losses[0][2] != pytest.approx(alone.losses[2], rel=TOLERANCE)  # SGD's
