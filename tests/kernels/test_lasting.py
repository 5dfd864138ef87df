"""Tables that calls share: those that a CUDA graph reads stay, however many others come."""

import gc
import weakref

import pytest
import torch

from lasp.kernels.lasting import kept


@pytest.mark.parametrize("in_graph", [False, True])
def test_what_a_graph_reads_is_kept(monkeypatch, in_graph):
    @kept(2)
    def table(number):
        return torch.full((2,), number)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    read = weakref.ref(table(0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert table(0) is read()
    for number in range(1, 4):
        table(number)
    gc.collect()
    assert (read() is not None) == in_graph


def test_what_is_kept_is_good_for_training_when_first_asked_for_in_inference():
    @kept(2)
    def table():
        return torch.ones(2)

    with torch.inference_mode():
        table()
    assert not table().is_inference()
