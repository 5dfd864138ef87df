"""One thread, Triton's interpreter where there is no GPU, and random numbers that are new in each run."""

import os
import random
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated, so before lasp is imported
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lasp")
    group.addoption("--seed", type=int, help="repeat the random inputs of a run that printed this seed")
    group.addoption(
        "--zero-exchange",
        action="store_true",
        help="replace what arrives from other ranks by zeros and expect every multi-rank test to fail",
    )
    group.addoption("--all-meshes", action="store_true", help="train Megatron models on every mesh, not on a few")
    group.addoption("--collective-timeout", type=float, default=60.0, help="seconds before a collective gives up")


@pytest.fixture(scope="session")
def run_seed(pytestconfig: pytest.Config) -> int:
    """The seed of this run, the same on every rank."""
    seed = pytestconfig.getoption("seed")
    return random.SystemRandom().randrange(2**31) if seed is None else seed


@pytest.fixture
def gen(request: pytest.FixtureRequest, run_seed: int) -> torch.Generator:
    """A generator of the test's own, the same on every rank; a failing test shows the option that repeats it."""
    print(f"random inputs: --seed {run_seed}")
    return torch.Generator().manual_seed(run_seed ^ zlib.crc32(request.node.nodeid.encode()))
