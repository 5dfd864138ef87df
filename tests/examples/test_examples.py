"""The examples run as their first lines say, here on two processes without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(ranks, script, *arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [*launch, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    # Python may end while a thread of PyTorch's gloo still frees the last collective's tensors; then gloo aborts.
    aborted_at_the_end = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted_at_the_end, done.stderr[-4000:]
    return done.stdout


def test_own_pytorch_model():
    """The script itself compares the losses of two ranks with those of one."""
    assert "all ranks  one rank" in run(2, "own_pytorch_model.py")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_script():
    """SGD's losses are one rank's, so the scale of the gradients is right."""

    def losses(ranks):
        lines = [line for line in run(ranks, "deepspeed_script.py", "3").splitlines() if line.startswith("step")]
        return [float(line.split()[-1]) for line in lines]

    alone = losses(1)
    assert len(set(alone)) == 5
    assert losses(2) == pytest.approx(alone, rel=2e-6)
