"""The benchmarks of the exchanges run, with tiny shapes on two CPU ranks, and write what they say."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks import simulate
from lasp.parallel.cost import Costs

ROOT = Path(__file__).parents[2]


def launch(*options: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [*command, "benchmarks/exchange.py", "--heads", "2", "--head-dim", "8", "--runs", "1", *options]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exchanges_and_ops_are_timed():
    output = launch(
        "--tokens", "16", "--ops", "scalar", "delta", "softmax", "--exchanges", "all_gather", "scan", "auto"
    )
    assert output.count("x bare all-gather") == 4 * 4
    assert output.count("x without") == 2 * 4
    assert "softmax, 16 tokens a rank" in output


def test_calibration_is_what_the_simulator_reads(tmp_path):
    file = tmp_path / "links.json"
    launch("--calibrate", "inside", "--sizes", "1024", "65536", "--costs", str(file))
    costs = Costs.read(file)
    assert costs.inside != Costs().inside and costs.across == Costs().across
    picture = tmp_path / "curves.png"
    simulate.main(simulate.Settings(ranks=(2, 4), costs=file, output=picture))
    assert picture.stat().st_size > 1000
