"""The cost model against the schedules, played message by message, and against itself."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from benchmarks import simulate
from lasp.names import ExchangeName
from lasp.parallel import comm, exchange
from lasp.parallel.combine import Affine
from lasp.parallel.cost import (
    Costs,
    Link,
    Links,
    Message,
    blocks,
    candidates,
    choose,
    hierarchical_seconds,
    scan_seconds,
    seconds,
)
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.layout import Layout
from lasp.parallel.topology import ranks_per_node

LINKS = Links(Link(20e-6, 200e9), Link(40e-6, 300e9), Link(10e-6, 370e9))
COSTS = Costs(LINKS, LINKS)  # no node boundary is felt


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 8, 33, 256])
def test_schedules_take_what_the_closed_forms_say(ranks: int, ways: int):
    message = Message(8 << 20, 3 << 20, ways)
    assert simulate.all_gather(COSTS, message, ranks, 8) == pytest.approx(seconds("all_gather", LINKS, message, ranks))
    assert simulate.scan(COSTS, message, ranks, 8) == pytest.approx(seconds("scan", LINKS, message, ranks))
    for count in (1, 5, 64):
        expected = scan_seconds(LINKS.message, message, ranks, count)
        assert simulate.scan(COSTS, message, ranks, 8, count) == pytest.approx(expected)
    if ranks % 8 == 0:
        expected = hierarchical_seconds(COSTS, message, ranks, 8)
        assert simulate.hierarchical(COSTS, message, ranks, 8) == pytest.approx(expected)
    if ranks <= 8:
        expected = seconds("symmetric_memory", LINKS, message, ranks)
        assert simulate.peer_writes(COSTS, message, ranks, 8) == pytest.approx(expected)


def test_links_of_two_kinds_cost_more_than_all_of_the_faster_and_less_than_all_of_the_slower():
    message, costs = Message(1 << 20), Costs()
    for name in ("all_gather", "scan"):
        across = simulate.SCHEDULES[name](costs, message, 64, 8)
        fast, slow = (seconds(name, links, message, 64) for links in (costs.inside, costs.across))
        assert fast < across < 1.01 * slow


@pytest.mark.parametrize("ranks", [2, 5, 64, 1000])
def test_blocks_are_the_best_number_of_them(ranks: int):
    message = Message(32 << 20)
    times = {count: scan_seconds(LINKS.message, message, ranks, count) for count in range(1, 65)}
    assert times[blocks(LINKS.message, message, ranks)] == min(times.values())


def test_the_cheapest_exchange_is_chosen():
    names = ("symmetric_memory", "all_gather", "scan")
    assert choose(Costs(), Message(1 << 20), 2, 2, names) == "symmetric_memory"
    assert choose(Costs(), Message(1 << 20), 16, 1, names) == "all_gather"
    assert choose(Costs(), Message(16 << 20), 128, 1, names) == "scan"
    assert seconds("symmetric_memory", Costs().across, Message(1), 2) == math.inf


def test_calibration_is_read_as_it_was_written(tmp_path):
    costs = Costs(LINKS, Links(Link(1e-4, 1e9), Link(2e-4, 2e9)))
    costs.save(tmp_path / "folder" / "links.json")
    assert Costs.read(tmp_path / "folder" / "links.json") == costs
    assert Costs.read(tmp_path / "nothing.json") == Costs()
    (tmp_path / "wrong.json").write_text('{"inside": {"all_gather": {"latency": 0, "bandwidth": 1}}}')
    with pytest.raises(ValueError, match="wrong.json.*latency: got 0"):
        Costs.read(tmp_path / "wrong.json")


def test_a_link_is_fitted_to_times():
    link = Link(30e-6, 5e9)
    sizes = [1 << power for power in range(26)]
    fitted = Link.fit(sizes, [link.seconds(size) for size in sizes])
    assert fitted.latency == pytest.approx(link.latency, rel=1e-3)
    assert fitted.bandwidth == pytest.approx(link.bandwidth, rel=1e-3)


def test_links_that_nobody_measured_decide_nothing(tmp_path):
    """Calibration of the links inside nodes leaves those across a guess."""
    replace(Costs(), inside=LINKS).save(tmp_path / "links.json")
    for guess in (Costs(), Costs.read(tmp_path / "links.json")):
        assert candidates(guess, 64, 8) == candidates(guess, 64, 1) == ("all_gather",)
        assert candidates(guess, 8, 8) == ("symmetric_memory", "all_gather", "scan")
    replace(Costs(), across=LINKS).save(tmp_path / "links.json")
    measured = Costs.read(tmp_path / "links.json")
    assert candidates(measured, 64, 8) == ("all_gather", "scan", "hierarchical")
    assert candidates(measured, 64, 1) == ("all_gather", "scan")


def test_auto_across_nodes_is_the_all_gather_until_links_are_measured(monkeypatch):
    monkeypatch.setattr(comm, "message_device", lambda group: torch.device("cuda"))
    for costs, names in ((Costs(), {"all_gather"}), (Costs(across=LINKS), {"all_gather", "scan"})):
        monkeypatch.setattr(exchange, "topology", lambda group, costs=costs: (costs, 1))
        assert set(exchange.make_exchange("auto", Layout("contiguous", 4), None).exchanges) == names


def test_every_exchange_has_a_name():
    assert set(exchange.EXCHANGES) == set(get_args(ExchangeName))


def test_auto_takes_the_fastest_and_tells_its_name():
    exchanges = {"all_gather": object(), "scan": object()}
    for heads in (1, 4096):
        states = torch.empty(2, 1, heads, 64, 64, device="meta")
        auto, message = Auto(exchanges, COSTS, 64, 8), Message(states.nbytes, ways=2)
        assert auto.fastest(message) == choose(COSTS, message, 64, 8, tuple(exchanges))
        assert auto.chosen(states, None, Affine((False,), backward=False)) is exchanges[auto.fastest(message)]


def test_nodes_are_hierarchical_where_their_links_are_slow():
    """64 ranks of eight nodes: a state of 8 MiB is gathered in each node sooner than by all, or passed on by all."""
    names = ("all_gather", "scan", "hierarchical")
    assert choose(Costs(), Message(8 << 20), 64, 8, names) == "hierarchical"
    assert choose(COSTS, Message(1 << 12), 2, 2, names) != "hierarchical"


@pytest.mark.parametrize(
    ("hosts", "expected"), [("aabb", 2), ("aaaa", 4), ("abcd", 1), ("abab", 1), ("aaab", 1), ("aabbaa", 1), ("a", 1)]
)
def test_machines_must_have_as_many_consecutive_ranks(hosts: str, expected: int):
    assert ranks_per_node(list(hosts)) == expected
