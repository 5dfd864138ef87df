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
import torch.distributed as dist

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
    model = build(alone.kind, mesh)
    models.load(model, alone.folder / "weights")
    losses = models.train_on_mesh(model, alone.batches)
    models.save_gradient(model, shared_tmp_path / "gradient")
    assert losses == pytest.approx(alone.losses, rel=TOLERANCE)
    models.check_gradient(shared_tmp_path / "gradient", alone.folder / "gradient", TOLERANCE)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_bad_batches_are_refused_on_every_rank(ranks):
    """Lengths that 2 · CP does not divide, before anything is computed."""
    Mesh(cp=ranks.size).enter()
    model = models.gpt(Mesh(cp=ranks.size))
    tokens = torch.zeros(1, 2 * ranks.size + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="sequence length: got"):
        models.shard_batch({"tokens": tokens}, dist.group.WORLD)
    odd = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"sequence length: got \d+, expected a multiple of 2"):
        model(odd, odd, None, labels=odd)
