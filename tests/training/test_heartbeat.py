"""What ranks leave behind of where they are, and what others say of it."""

import json
import threading
import time

import pytest
import torch

from lasp.training import heartbeat, runtime
from lasp.training.runtime import World
from tests.patience import PATIENCE


def world(rank=0, size=3, doing="step 5"):
    return World(rank=rank, size=size, device=torch.device("cpu"), mesh=None, saves=None, doing=doing)


@pytest.fixture
def write(tmp_path):
    def write(rank, *, ago, doing):
        state = {"process": 7, "host": "node", "time": time.time() - ago, "doing": doing, "at": ["comm.py:1 wait"]}
        (tmp_path / "ranks" / f"heartbeat-{rank:05d}").write_text(json.dumps(state))

    (tmp_path / "ranks").mkdir()
    return write


def test_a_rank_says_where_it_is_until_it_ends_well(tmp_path, monkeypatch):
    written = threading.Event()
    state = heartbeat._state
    monkeypatch.setattr(heartbeat, "PERIOD", 0.001)
    file = tmp_path / "ranks" / "heartbeat-00001"

    def say(world):
        if file.exists() and "step 6" in file.read_text():
            written.set()
        return state(world)

    monkeypatch.setattr(heartbeat, "_state", say)
    here = world(rank=1)
    with heartbeat.heartbeat(tmp_path, here):
        here.doing = "step 6"
        assert written.wait(PATIENCE)
        (line,) = [line for line in json.loads(file.read_text())["at"] if "test_a_rank_says" in line]
        assert "test_heartbeat.py:" in line
    assert not file.exists()


def test_an_error_of_messages_names_the_ranks_behind(tmp_path, write):
    write(1, ago=500, doing="step 5")
    write(2, ago=1, doing="step 4")
    write(3, ago=900, doing="step 2")  # of a larger world, before
    with pytest.raises(RuntimeError) as error, heartbeat.heartbeat(tmp_path, world()):
        assert not (tmp_path / "ranks" / "heartbeat-00003").exists()
        raise RuntimeError("timed out")
    assert error.value.__notes__ == [
        "rank 1 (process 7 of node) was last seen 500 s ago, during step 5, at comm.py:1 wait",
        "rank 2 (process 7 of node) was last seen 1 s ago, during step 4, at comm.py:1 wait",
    ]
    assert (tmp_path / "ranks" / "heartbeat-00000").exists()


def test_other_errors_and_damaged_files_say_nothing(tmp_path, write):
    write(1, ago=500, doing="step 5")
    (tmp_path / "ranks" / "heartbeat-00002").write_text("{")
    with pytest.raises(ValueError, match="bad") as error, heartbeat.heartbeat(tmp_path, world()):
        raise ValueError("bad")
    assert not hasattr(error.value, "__notes__")


def test_the_flight_recorder_is_told_where_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    for name in ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    runtime._record_flights(str(tmp_path))
    assert runtime.os.environ["TORCH_FR_BUFFER_SIZE"] == "7"
    assert runtime.os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert runtime.os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "ranks" / "nccl-trace-")
