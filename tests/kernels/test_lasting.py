"""What is kept for calls to come, on streams that a test names."""

import pytest
import torch

from lasp.kernels import lasting

CPU = torch.device("cpu")


@pytest.fixture
def streams(monkeypatch):
    """Sets the current stream, and whether it is being captured."""

    def current(stream: int, capturing: bool = False) -> None:
        monkeypatch.setattr(lasting, "_stream", lambda device: (stream, capturing))

    current(0)
    return current


def make_kept(most: int):
    return lasting.kept(most)(lambda size, device: torch.zeros(size, device=device))


def test_the_last_ones_are_kept(streams):
    zeros = make_kept(2)
    first, second = zeros(1, CPU), zeros(2, CPU)
    assert zeros(1, CPU) is first
    zeros(3, CPU)
    assert zeros(1, CPU) is first
    assert zeros(2, CPU) is not second


def test_streams_share_nothing(streams):
    zeros = make_kept(2)
    first = zeros(1, CPU)
    streams(1)
    second = zeros(1, CPU)
    assert second is not first
    assert zeros(1, CPU) is second
    streams(0)
    assert zeros(1, CPU) is first


def test_what_a_graph_reads_was_there_before_and_stays(streams):
    zeros = make_kept(1)
    first = zeros(1, CPU)
    streams(1, capturing=True)
    assert zeros(1, CPU) is first
    streams(0)
    zeros(2, CPU)
    zeros(3, CPU)
    assert zeros(1, CPU) is first


def test_a_graph_reads_its_own_streams(streams):
    zeros = make_kept(1)
    zeros(1, CPU)
    streams(1)
    second = zeros(1, CPU)
    streams(1, capturing=True)
    assert zeros(1, CPU) is second


def test_what_is_made_within_a_graph_is_not_kept(streams):
    zeros = make_kept(1)
    streams(1, capturing=True)
    first = zeros(1, CPU)
    streams(1)
    assert zeros(1, CPU) is not first


def test_what_is_made_in_inference_mode_is_good_for_autograd(streams):
    zeros = make_kept(1)
    with torch.inference_mode():
        assert not zeros(1, CPU).is_inference()
