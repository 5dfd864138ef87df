"""The multi-rank harness itself: ranks agree on every test, nothing waits for ever, the mutation spares no test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]

FAILING = """
import signal
from datetime import timedelta
import pytest, torch, torch.distributed as dist
pytestmark = pytest.mark.mpi

def total(group):
    x = torch.ones(())
    dist.all_reduce(x, group=group)
    return x.item()

def total_in_vain():
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    total(dist.group.WORLD)

@pytest.fixture
def broken_on_rank_0(ranks):
    assert ranks.rank != 0

def test_sum(group): assert total(group) == dist.get_world_size(group)
def test_wrong_on_rank_1(ranks): assert ranks.rank != 1
def test_rank_0_misses_a_collective(ranks):
    if ranks.rank == 0:
        raise KeyError("early")
    total_in_vain()
def test_fixture(broken_on_rank_0): total_in_vain()
def test_sum_again(group): assert total(group) == dist.get_world_size(group)
def test_rank_1_never_ends(ranks):
    ranks.barrier("everybody is here")
    ranks.store.set_timeout(timedelta(seconds=1))
    if ranks.rank == 1:
        signal.pause()
def test_after_the_end(): pass
"""

MUTATED = """
import pytest, torch
from lasp.parallel import comm
pytestmark = pytest.mark.mpi

def test_uses_what_arrives(group):
    x = torch.tensor([1.0 + comm.rank(group)])
    assert comm.all_gather(x, group).wait()[:, 0].tolist() == [r + 1 for r in range(comm.size(group))]
def test_does_not(): pass
def test_breaks(): raise ValueError
@pytest.mark.no_exchange
def test_says_so(): pass
"""


def launch(folder: Path, source: str, world: int, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Runs a test file under torchrun: its exit code and, for each rank, how every test ended."""
    (folder / "test_inner.py").write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
    command += ["--redirects=3", f"--log-dir={folder}", "-m", "pytest", "-v", "--only-mpi", f"--rootdir={ROOT}"]
    command += ["-p", "tests.conftest", *options, str(folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # a rank may be ended by torchrun because another one ended
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=PATIENCE, capture_output=True)
    logs = [next(folder.glob(f"**/{rank}/stdout.log")).read_text() for rank in range(world)]
    return done.returncode, [dict(re.findall(r"::(\S+) ([A-Z]+)", log)) for log in logs]


def test_a_test_that_fails_on_one_rank_fails_on_all_and_harms_no_later_one(tmp_path: Path) -> None:
    code, outcomes = launch(tmp_path, FAILING, 3)
    assert code != 0
    for rank, outcome in enumerate(outcomes):
        assert outcome == {
            "test_sum[world]": "PASSED",
            "test_sum[subgroup]": "PASSED",
            "test_wrong_on_rank_1": "FAILED",
            "test_rank_0_misses_a_collective": "FAILED",
            "test_fixture": "ERROR" if rank == 0 else "FAILED",
            "test_sum_again[world]": "PASSED",
            "test_sum_again[subgroup]": "PASSED",
        }


def test_mutation_wants_every_test_to_fail_by_assertion(tmp_path: Path) -> None:
    code, outcomes = launch(tmp_path, MUTATED, 2, "--zero-exchange")
    assert code != 0
    for outcome in outcomes:
        assert outcome == {
            "test_uses_what_arrives[world]": "XFAIL",
            "test_does_not": "FAILED",
            "test_breaks": "FAILED",
            "test_says_so": "SKIPPED",
        }


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_groups_work_at_the_same_time(group: dist.ProcessGroup, ranks) -> None:
    members = dist.get_process_group_ranks(group)
    assert ranks.rank in members
    assert set(members) == {r for r in range(ranks.size) if ranks.size == len(members) or r % 2 == ranks.rank % 2}
    total = torch.tensor(ranks.rank)
    dist.all_reduce(total, group=group)
    assert total == sum(members)


@pytest.mark.mpi
@pytest.mark.no_exchange
def test_ranks_share_random_numbers_and_a_folder(gen: torch.Generator, shared_tmp_path: Path, ranks) -> None:
    (shared_tmp_path / str(ranks.rank)).write_text(str(torch.rand(8, generator=gen).tolist()))
    dist.barrier()
    assert len({path.read_text() for path in shared_tmp_path.iterdir()}) == 1
    assert len(list(shared_tmp_path.iterdir())) == ranks.size
