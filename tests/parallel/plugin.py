"""Runs the tests marked `mpi` on the ranks of one launch (mpirun or torchrun): a test passes where it passes on all."""

import os
import random
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch.distributed as dist

from lasp.parallel import leave
from tests.parallel.harness import Ranks, WrongOnSomeRank, launched
from tests.parallel.zero_exchange import zero_exchange

RANKS = pytest.StashKey[Ranks]()
OUTCOMES = (Exception, pytest.fail.Exception, pytest.skip.Exception)


def pytest_configure(config: pytest.Config) -> None:
    if launched():
        config.stash[RANKS] = Ranks(config.getoption("collective_timeout"), config.getoption("gpu"))
    if config.getoption("zero_exchange"):
        zero_exchange()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what shows nothing new on so many ranks.

    Under --zero-exchange a test must fail, and by an assertion, unless it says that it exchanges nothing.
    """
    if (ranks := _ranks(config)) and not config.getoption("full") and not config.getoption("zero_exchange"):
        others = [item for item in items if any(ranks.size not in m.args for m in item.iter_markers("ranks"))]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        if (marker := item.get_closest_marker("cpu_only")) and config.getoption("gpu"):
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))
    if not config.getoption("zero_exchange"):
        return
    for item in items:
        if item.get_closest_marker("no_exchange"):
            item.add_marker(pytest.mark.skip(reason="exchanges nothing"))
        elif item.get_closest_marker("mpi"):
            item.add_marker(pytest.mark.xfail(strict=True, raises=WrongOnSomeRank, reason="the exchange returns zeros"))


def pytest_unconfigure(config: pytest.Config) -> None:
    ranks = _ranks(config)
    if ranks is None:
        return
    if ranks.broken:  # the others may wait for ever: end without asking them, so that the launcher ends them
        sys.stdout.flush()
        os._exit(3)
    ranks.barrier("end")  # a launcher may end the others with the first: let all print their reports before
    ranks.groups.clear()
    leave()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" in metafunc.fixturenames:
        ranks, config = _ranks(metafunc.config), metafunc.config
        world = ranks is None or (metafunc.definition.get_closest_marker("world") and not config.getoption("full"))
        metafunc.parametrize("group", ["world"] if world else list(ranks.groups), indirect=True)


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Ranks:
    return pytestconfig.stash[RANKS]


@pytest.fixture
def two(ranks: Ranks) -> Ranks:
    if ranks.size != 2:
        pytest.skip("wants 2 ranks")
    return ranks


@pytest.fixture
def group(request: pytest.FixtureRequest, ranks: Ranks) -> dist.ProcessGroup:
    """Each of the process groups in turn; a test that uses it runs in all subgroups at the same time."""
    return ranks.groups[request.param]


@pytest.fixture
def shared_tmp_path(request: pytest.FixtureRequest, ranks: Ranks, tmp_path: Path) -> Path:
    """One temporary folder for all ranks."""
    return Path(ranks.broadcast(f"{request.node.nodeid} tmp_path", str(tmp_path)))


@pytest.fixture(scope="session")
def run_seed(pytestconfig: pytest.Config) -> int:
    """The seed of this run, the same on every rank."""
    seed, ranks = pytestconfig.getoption("seed"), _ranks(pytestconfig)
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    return int(ranks.broadcast("seed", str(seed))) if ranks else seed


def _ranks(config: pytest.Config) -> Ranks | None:
    return config.stash.get(RANKS, None)


def _ranks_of(item: pytest.Item) -> Ranks | None:
    return _ranks(item.config) if item.get_closest_marker("mpi") else None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    __tracebackhide__ = True
    ranks = _ranks_of(pyfuncitem)
    try:
        result = yield
    except OUTCOMES as error:
        if ranks:
            ranks.settle(pyfuncitem.nodeid, error)
        raise
    if ranks:
        ranks.settle(pyfuncitem.nodeid, None)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The groups that a test here has made end with it; Megatron's meshes, elsewhere, are kept for other tests."""
    ranks = _ranks_of(item) if item.path.is_relative_to(Path(__file__).parent) else None
    before = ranks.made_groups() if ranks else set()
    result = yield
    if ranks:
        ranks.end_groups(but=before | {group for group in ranks.groups.values() if group})
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """A test whose fixtures fail has a verdict, too: the other ranks may have entered its body and wait for it."""
    __tracebackhide__ = True
    try:
        yield
    except OUTCOMES as error:
        if ranks := _ranks_of(item):
            ranks.settle(item.nodeid, error)
        raise
