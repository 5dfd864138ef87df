"""One thread, Triton's interpreter where there is no GPU, and random numbers that are new in each run."""

import gc
import os
import zlib
from importlib.util import find_spec

import pytest
import torch

from tests.patience import PATIENCE

INTERPRETED = find_spec("triton") is not None and not torch.cuda.is_available()
if INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated, so before lasp is imported
torch.set_num_threads(1)

if INTERPRETED:
    from tests.interpreter import hasten

    hasten()
pytest_plugins = ["tests.parallel.plugin"]
PYTEST_MPI = find_spec("pytest_mpi") is not None  # torchrun needs neither that nor MPI


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lasp")
    if not PYTEST_MPI:
        group.addoption("--only-mpi", action="store_true", help="run the tests for several ranks, and no others")
    group.addoption("--seed", type=int, help="repeat the random inputs of a run that printed this seed")
    group.addoption(
        "--zero-exchange",
        action="store_true",
        help="replace what arrives from other ranks by zeros and expect every multi-rank test to fail",
    )
    group.addoption("--all-meshes", action="store_true", help="train Megatron models on every mesh, not on a few")
    group.addoption("--gpu", action="store_true", help="several ranks work on a GPU each, over NCCL")
    group.addoption("--full", action="store_true", help="also tests on numbers of ranks where they show nothing new")
    group.addoption("--collective-timeout", type=float, default=PATIENCE, help="seconds before a collective gives up")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "mpi: runs on all ranks of one launch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What pytest-mpi does, where it is not installed."""
    if PYTEST_MPI:
        return
    for item in items:
        if (item.get_closest_marker("mpi") is not None) != config.getoption("only_mpi"):
            item.add_marker(pytest.mark.skip(reason="with --only-mpi the tests for several ranks run, else the others"))


def pytest_collection_finish() -> None:
    """Modules stay, so those who collect garbage, as every run of training does, need not look through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def gen(request: pytest.FixtureRequest, run_seed: int) -> torch.Generator:
    """A generator of the test's own, the same on every rank, on the device that tensors are made on; a failing test
    shows the option that repeats it."""
    print(f"random inputs: --seed {run_seed}")
    return torch.Generator(torch.get_default_device()).manual_seed(run_seed ^ zlib.crc32(request.node.nodeid.encode()))
