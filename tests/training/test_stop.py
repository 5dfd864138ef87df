"""A run that is told to stop stops between two steps, with a checkpoint."""

import os
import signal
import threading
from dataclasses import replace

import pytest

import lasp.training.train as loop
from lasp.training import checkpoint
from lasp.training.metrics import read_metrics
from lasp.training.stop import Stopped, stop_signals
from lasp.training.train import train


def losses(run_dir):
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir) if "loss" in r]


@pytest.fixture(autouse=True)
def heeded():
    """SIGINT, also where whoever started the tests had it ignored, as shells do for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_no_step(config, tmp_path, monkeypatch, capsys, number):
    straight = replace(config, run_dir=str(tmp_path / "straight"))
    loss = train(straight)
    with monkeypatch.context() as patch:
        count = loop.learning_rate

        def tell(optimizer, step, steps):
            if step == 1:
                os.kill(os.getpid(), number)
            return count(optimizer, step, steps)

        patch.setattr(loop, "learning_rate", tell)
        with pytest.raises(Stopped) as stopped:
            train(config)
    assert stopped.value.code == 75
    assert "told to stop: step 2 is saved" in " ".join(capsys.readouterr().out.split())
    assert checkpoint.require_latest(config.run_dir).name == "step-00000002"
    assert len(losses(config.run_dir)) == 2
    assert train(config) == loss
    assert losses(config.run_dir) == losses(straight.run_dir)


def test_a_signal_in_the_last_step_changes_nothing(config, monkeypatch):
    monkeypatch.setattr(loop.Metrics, "log", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert train(replace(config, steps=1)) > 0


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_signals() as told:
        assert not told.asked(None)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.asked(None)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_is_ignored_stays_so():
    """As SIGINT in what a shell's script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as told:
            os.kill(os.getpid(), signal.SIGINT)
            assert not told.asked(None)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_by_the_user_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stop_signals() as told:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's copy
        told.since -= 60
        os.kill(os.getpid(), signal.SIGINT)


def test_threads_leave_signals_alone():
    def use():
        with stop_signals() as told:
            seen.append(told.asked(None))

    seen = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]
