"""What goes wrong with a checkpoint on one rank goes wrong on all of them, and nothing is committed."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lasp.config import DataConfig, ParallelConfig, TrainConfig
from lasp.models import Decoder, tiny
from lasp.parallel import comm
from lasp.parallel.apply import parallelize
from lasp.parallel.groups import make_cpu_group
from lasp.training import checkpoint
from lasp.training.optimizer import build_optimizer
from lasp.training.ownership import hold
from lasp.training.together import together

pytestmark = [pytest.mark.mpi, pytest.mark.no_exchange, pytest.mark.cpu_only("it saves from CPUs")]


@pytest.fixture
def config(shared_tmp_path):
    return TrainConfig(
        model=tiny(),
        data=DataConfig(train="train", valid="valid"),
        run_dir=str(shared_tmp_path / "run"),
        steps=9,
        context_length=8,
        dtype="float32",
        parallel=ParallelConfig(timeout=60),
        checkpoint_keep=9,
    )


@pytest.fixture
def parts(ranks, config):
    """A model whose weights every rank holds a shard of, and its optimiser after a step."""
    mesh = dist.init_device_mesh("cpu", (1, ranks.size), mesh_dim_names=("dp", "sp"))
    model = parallelize(Decoder(config.model), mesh, fsdp=True)
    optimizer = build_optimizer(model, config.optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def names(config):
    return sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())


def test_a_shard_that_is_not_finite_names_parameter_and_rank(ranks, config, parts):
    last = ranks.size - 1
    weight = parts[0].embedding.weight
    if ranks.rank == last:
        parts[1].state[weight]["exp_avg"].to_local()[-1, -1] = float("nan")
    with pytest.raises(FloatingPointError, match=f"^rank {last}: optimizer.state.embedding.weight.exp_avg: got"):
        checkpoint.save(config.run_dir, 1, *parts, config)
    assert not (Path(config.run_dir) / "checkpoints").exists()


def test_every_ranks_files_have_checksums_and_damage_is_passed_over_together(ranks, config, parts):
    for step in (1, 2, 3):
        checkpoint.save(config.run_dir, step, *parts, config)
    newest = checkpoint.require_latest(config.run_dir)
    assert all(f"__{rank}_0.distcp" in (newest / "SHA256SUMS").read_text() for rank in range(ranks.size))
    ranks.barrier("all have looked")
    if ranks.rank == 0:
        for step, file in ((2, f"__{ranks.size - 1}_0.distcp"), (3, "__0_0.distcp")):
            damaged = newest.with_name(f"step-0000000{step}") / file
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    ranks.barrier("two are damaged")
    assert checkpoint.restore(config.run_dir, *parts, config) == 1
    ranks.barrier("all have restored")
    if ranks.rank == 0:
        (newest.with_name("step-00000001") / ".metadata").unlink()
    ranks.barrier("all are damaged")
    with pytest.raises(ValueError, match=r"^rank \d: checkpoint .*step-00000001: got"):
        checkpoint.restore(config.run_dir, *parts, config)


def test_a_file_that_rank_0_does_not_see_is_not_committed(ranks, config, shared_tmp_path):
    """As on nodes with directories of their own."""
    last = ranks.size - 1

    def write(directory):
        own = shared_tmp_path / "elsewhere" if ranks.rank == last else directory
        own.mkdir(exist_ok=True)
        (own / f"__{ranks.rank}_0.distcp").write_text("weights")
        ranks.barrier("all have written")
        return own.glob(f"__{ranks.rank}_*")

    with pytest.raises(
        ValueError, match=rf"got \"no \['__{last}_0.distcp'\] of rank {last}\", expected what every rank"
    ):
        checkpoint.commit(config.run_dir, 1, config, write)
    assert checkpoint.latest(config.run_dir) is None


def test_rank_0s_errors_while_it_commits_are_everybodys(ranks, config, parts, monkeypatch):
    checkpoint.save(config.run_dir, 1, *parts, config)
    if ranks.rank == 0:
        monkeypatch.setattr(checkpoint, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="rank 0: .*disk full"):
        checkpoint.save(config.run_dir, 2, *parts, config)
    assert checkpoint.require_latest(config.run_dir).name == "step-00000001"


@pytest.mark.parametrize("beside", [False, True])
def test_messages_of_saving_and_loading_have_a_time_limit_of_their_own(ranks, config, parts, monkeypatch, beside):
    group, gather, used = make_cpu_group(77.0), comm.gather_objects, []
    monkeypatch.setattr(comm, "gather_objects", lambda x, group: (used.append(group), gather(x, group))[1])
    saving = checkpoint.save(config.run_dir, 1, *parts, replace(config, checkpoint_async=beside), group=group)
    assert (saving is not None) == beside
    if saving is not None:
        saving.wait()
    assert checkpoint.restore(config.run_dir, *parts, config, group) == 1
    assert set(used) == {group}
    assert comm.timeout(group) == 77.0
    dist.destroy_process_group(group)


def test_one_run_on_ranks_that_see_one_directory(ranks, config, shared_tmp_path):
    with hold(config.run_dir, dist.group.WORLD):
        assert (Path(config.run_dir) / "lock").exists()
        ranks.barrier("all hold it")
        message = f"^rank 0: run_dir: got .*, where process {os.getpid() if ranks.rank == 0 else '[0-9]+'} of host"
        with pytest.raises(ValueError, match=message), hold(config.run_dir, dist.group.WORLD):
            pass
    ranks.barrier("all have left it")
    assert not (Path(config.run_dir) / "lock").exists()
    own = str(shared_tmp_path / f"of rank {min(ranks.rank, 1)}")
    message = "^rank 1: run_dir: got '.*of rank 1', where host .* does not see what rank 0"
    with pytest.raises(ValueError, match=message), hold(own, dist.group.WORLD):
        pass
    ranks.barrier("all were refused")
    assert not (shared_tmp_path / "of rank 0" / "lock").exists()


def test_errors_keep_their_kinds_and_tell_their_rank(ranks):
    group = dist.group.WORLD
    assert together(group, lambda: ranks.rank**2) == [rank**2 for rank in range(ranks.size)]

    def fail(error):
        if ranks.rank == 1:
            raise error

    for error, kind in (
        (FileNotFoundError("gone"), OSError),
        (ValueError("bad"), ValueError),
        (KeyError("k"), RuntimeError),
    ):
        with pytest.raises(kind, match=f"^rank 1: .*{error.args[0]}"):
            together(group, lambda error=error: fail(error))
