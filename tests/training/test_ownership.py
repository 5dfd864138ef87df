"""One run at a time in a directory."""

import json
import os
import subprocess
import threading

import pytest

from lasp.models import Decoder
from lasp.training import checkpoint, ownership
from lasp.training.optimizer import build_optimizer
from lasp.training.ownership import Lock, hold
from lasp.training.train import train


@pytest.fixture
def theirs(tmp_path):
    """The lock of another run, which this process holds."""
    lock = Lock(tmp_path / "run", "theirs")
    lock.acquire()
    return lock


def change(lock, **entries):
    lock.path.write_text(json.dumps(json.loads(lock.path.read_text()) | entries))


def test_a_live_run_is_left_alone(theirs):
    message = f"where process {os.getpid()} of host .* since .* trains, expected .* remove .*run/lock"
    with pytest.raises(ValueError, match=message), hold(theirs.run_dir, None):
        pass
    assert theirs.is_held()
    theirs.release()
    with hold(theirs.run_dir, None) as lock:
        assert lock.is_held()
        assert [path.name for path in lock.run_dir.iterdir() if path != theirs.probe] == ["lock"]
    assert not lock.path.exists()


def test_training_takes_the_lock(config):
    with hold(config.run_dir, None), pytest.raises(ValueError, match="run_dir: got .* of no other run"):
        train(config)


def test_a_run_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FileExistsError), hold(tmp_path / "run", None):
        pass


def test_an_error_gives_the_lock_back(theirs):
    theirs.release()
    with pytest.raises(KeyError), hold(theirs.run_dir, None):
        raise KeyError
    assert not theirs.path.exists()


def test_the_lock_of_a_dead_process_is_taken(theirs):
    dead = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    was = {"process": dead.pid, "started": ownership._identity(dead.pid)["started"]}
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    change(theirs, **was)  # a zombie
    with hold(theirs.run_dir, None):
        pass
    dead.communicate()
    theirs.acquire()
    change(theirs, **was)
    with hold(theirs.run_dir, None):
        pass
    theirs.acquire()
    change(theirs, started="0")  # its number is another process's now
    with hold(theirs.run_dir, None):
        pass


@pytest.mark.parametrize("damage", [None, "", "[]", "{}"])
def test_another_machines_lock_is_taken_when_it_has_gone_quiet(theirs, damage, monkeypatch):
    change(theirs, machine="another")
    if damage is not None:
        theirs.path.write_text(damage)
    long_ago = theirs.path.stat().st_mtime - 2 * ownership.STALE_AFTER
    os.utime(theirs.path, (long_ago, long_ago))
    monkeypatch.setattr(ownership.time, "sleep", lambda _: pytest.fail("it waits"))
    with hold(theirs.run_dir, None):
        pass


def test_another_machines_lock_goes_quiet_while_one_waits(theirs, monkeypatch, capsys):
    change(theirs, machine="another")
    monkeypatch.setattr(ownership, "STALE_AFTER", 0.2)
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    with hold(theirs.run_dir, None):
        pass
    assert "waiting for a sign of life" in capsys.readouterr().out


def test_another_machines_live_run_is_left_alone(theirs, monkeypatch):
    change(theirs, machine="another")
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    with theirs.heartbeat(), pytest.raises(ValueError, match="of no other run"), hold(theirs.run_dir, None):
        pass
    assert theirs.is_held()


def test_a_run_that_lost_its_lock_saves_no_more(config):
    """As ranks that outlive their launcher, when the lock was removed by hand and the next run has begun."""
    model = Decoder(config.model).double()
    parts = model, build_optimizer(model, config.optimizer), config
    with hold(config.run_dir, None) as old:
        checkpoint.save(config.run_dir, 1, *parts, old)
        old.path.unlink()
        with pytest.raises(ValueError, match="lock: got nobody"):
            checkpoint.save(config.run_dir, 2, *parts, old)
        with hold(config.run_dir, None) as new:
            checkpoint.save(config.run_dir, 3, *parts, new)
            with pytest.raises(ValueError, match=f"lock: got process {os.getpid()} .*, expected this run"):
                checkpoint.save(config.run_dir, 4, *parts, old)
            old.release()
            assert new.is_held()
    names = sorted(path.name for path in checkpoint.require_latest(config.run_dir).parent.iterdir())
    assert names == ["latest", "step-00000001", "step-00000003"]


def test_a_lock_lost_while_a_checkpoint_is_written_stops_it(config):
    with hold(config.run_dir, None) as lock:

        def write(directory):
            lock.path.unlink()
            return []

        with pytest.raises(ValueError, match="expected this run"):
            checkpoint.commit(config.run_dir, 1, config, write, lock)
    assert checkpoint.latest(config.run_dir) is None


def test_no_heartbeat_for_the_lock_of_another(theirs, monkeypatch):
    beat, touched = threading.Event(), []
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.001)
    monkeypatch.setattr(ownership.os, "utime", lambda path: (touched.append(path), beat.set()))
    with theirs.heartbeat():
        assert beat.wait(60)
    assert set(touched) == {theirs.path}
    touched.clear()
    change(theirs, nonce="another's")
    asked = threading.Event()
    held = Lock.is_held
    monkeypatch.setattr(Lock, "is_held", lambda lock: (held(lock), asked.set())[0])
    with theirs.heartbeat():
        assert asked.wait(60)
    assert touched == []
