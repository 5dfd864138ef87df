"""The launcher: which ranks it starts again, and what it leaves behind. The ranks here are scripts without PyTorch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.launches import is_alive
from lasp.training.stop import EXIT_CODE
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]

RANK = """
import json, os, signal, sys, time
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2]
rank, start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
one_dies = int(start) < {"dies": 1, "lives long and dies": 2}.get(what, 0)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(folder / f"{start}-{rank}").write_text(str(os.getpid()))
if what == "refused":
    error = {"message": {"message": "ValueError: no", "extraInfo": {"timestamp": "1"}}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(error))
    sys.exit(1)
if one_dies and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while not stopped:
    time.sleep(0.01)
sys.exit(1 if one_dies else 75)  # the other one was lost; told to stop
"""


@pytest.fixture
def launch(tmp_path):
    """Starts two ranks that do something; what is left of them is killed in the end."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "long").mkdir()
    text = (ROOT / "launch/elastic.py").read_text()
    (tmp_path / "long/elastic.py").write_text(text.replace("LONG = 3600.0", "LONG = 0.0"))
    started = []

    def start(what):
        launcher = (tmp_path / "long" if "long" in what else ROOT / "launch") / "elastic.py"
        command = [sys.executable, str(launcher), "2", str(tmp_path / "rank.py"), str(tmp_path), what]
        where = {"PYTHONPATH": str(ROOT), "MAX_RESTARTS": "1"}
        started.append(subprocess.Popen(command, env=os.environ | where, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def appear(path):
    """What is in a file, when it is there."""
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
    return path.read_text()


def test_ranks_are_started_again_when_one_dies_but_not_when_one_stops(launch, tmp_path):
    launcher = launch("dies")
    again = [int(appear(tmp_path / f"1-{rank}")) for rank in (0, 1)]
    os.kill(again[1], signal.SIGTERM)  # one alone, as Slurm may
    assert launcher.wait(PATIENCE) == EXIT_CODE
    assert not any(map(is_alive, again))
    assert not (tmp_path / "2-0").exists()


def test_ranks_that_have_lived_long_are_started_again_more_often_than_others(launch, tmp_path):
    """MAX_RESTARTS is 1."""
    launcher = launch("lives long and dies")
    os.kill(int(appear(tmp_path / "2-0")), signal.SIGTERM)
    assert launcher.wait(PATIENCE) == EXIT_CODE


def test_ranks_that_are_refused_are_not_started_again(launch, tmp_path):
    launcher = launch("refused")
    assert launcher.wait(PATIENCE) == 1
    assert "ValueError: no" in launcher.stderr.read()
    assert not (tmp_path / "1-0").exists()


LAUNCHER = """
import os, subprocess, sys
os.environ["LASP_LAUNCHER"] = str(os.getpid())
subprocess.run([sys.executable, "-c", *sys.argv[1:]])
"""
CHILD = """
import os, sys, time
from pathlib import Path
from lasp.launched import end_with_launcher

launcher = os.getppid()
Path(sys.argv[1]).write_text(str(os.getpid()))
while os.getppid() == launcher:
    time.sleep(0.01)
end_with_launcher()
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends them")
def test_a_killed_launcher_takes_a_rank_along_that_is_still_at_its_start(tmp_path):
    """Others: test_interruptions.py."""
    file = tmp_path / "rank"
    where = {"PYTHONPATH": str(ROOT), "TORCHELASTIC_ERROR_FILE": "none"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, CHILD, str(file)], env=os.environ | where)
    child = int(appear(file))
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + PATIENCE
    while is_alive(child):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)
