"""The benchmarks run, with tiny shapes on CPUs, and write what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks import simulate
from lasp.parallel.cost import Costs

ROOT = Path(__file__).parents[2]


def launch(script: str, options: str, ranks: int = 2) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [
        sys.executable,
        *torchrun,
        f"benchmarks/{script}.py",
        "--head-dim",
        "8",
        "--runs",
        "1",
        *options.split(),
    ]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_exchanges_and_ops_are_timed():
    options = "--heads 2 --tokens 16 --ops scalar delta softmax --exchanges all_gather scan auto"
    output = launch("exchange", options)
    rows = re.findall(r"^  \S.*\S +eager +[\d.]+ +[\d.]+ x$", output, re.MULTILINE)
    assert len(rows) == 2 * 4 * 4 + 2 * 4 + 1
    assert output.count("x bare all-gather") == 2 * 4 and output.count("x without") == 2
    assert "softmax, 16 tokens a rank" in output


def test_calibration_is_what_the_simulator_reads(tmp_path):
    file = tmp_path / "links.json"
    launch("exchange", f"--heads 2 --calibrate inside --sizes 1024 65536 --costs {file}")
    costs = Costs.read(file)
    assert costs.inside != Costs().inside and costs.across == Costs().across
    picture = tmp_path / "curves.png"
    simulate.main(simulate.Settings(ranks=(2, 4), costs=file, output=picture))
    assert picture.stat().st_size > 1000


def test_softmax_is_timed_over_ranks_and_emulated():
    options = "--heads 4 --kv-heads 4 --tokens 16 --packed 64 --accuracy-tokens 64 --ranks 4"
    output = launch("softmax", options)
    assert "2 ranks, 16 tokens each" in output and "2 ranks, 32 tokens each, 8 documents" in output
    output = launch("softmax", options, ranks=1)
    assert "4 ranks, 16 tokens each, 8 documents" in output
    ratios = [float(ratio) for ratio in re.findall(r"\( *([\d.]+)\)", output)]
    assert len(ratios) == 2 * 3 * 4 and max(ratios) < 2  # few tokens; enough to see that all arrive
