"""Megatron programs as users start them, each a launch of its own: the example, and training that goes on elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("megatron.core")

from lasp.data import TokenFileWriter
from lasp.integrations import megatron_weights
from tests.parallel.test_benchmarks import ended_well
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: str) -> str:
    """The output of two ranks; an error unless they succeed."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended_well(done), done.stderr[-3000:]
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\S+)", output)]


def test_example_learns():
    seen = losses(torchrun("examples/megatron_two_lines.py"))
    assert len(seen) == 10
    assert seen[-1] < seen[0]


def test_training_goes_on_over_another_mesh(tmp_path):
    """The second half on tensor-parallel ranks gives the losses of a run that stayed on context-parallel ones."""
    generator = np.random.default_rng()
    with TokenFileWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(8):
            writer.add_document(generator.integers(0, 256, size=200))
    run = ["launch/megatron_rank.py", "--preset", "tiny", "--data", str(tmp_path / "data")]
    run += ["--run-dir", str(tmp_path / "run"), "--steps", "4", "--sequence-length", "64", "--save-every", "2"]
    run += ["--lr", "0.01", "--warmup-steps", "0"]
    whole = losses(torchrun(*run, "--context-parallel", "2"))
    assert len(whole) == 4
    assert whole[-1] < whole[0]
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_2")
    rest = losses(torchrun(*run, "--tensor-parallel", "2"))
    assert rest == pytest.approx(whole[2:], abs=2e-4)  # printed with four digits

    weights = str(tmp_path / "run" / "checkpoints" / "step_4")
    assert megatron_weights.load(weights).config.pattern == "LLLN"
    run[run.index("--run-dir") + 1] = str(tmp_path / "another")
    begun = losses(torchrun(*run, "--context-parallel", "2", "--initial-weights", weights))
    assert begun[0] < whole[0]
