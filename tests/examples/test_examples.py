"""The examples run as their first lines say, here on two processes without a GPU."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lasp.parallel import SequenceParallel
from tests.parallel.scripts import run_script
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed reads it when imported


def test_own_pytorch_model():
    """In processes of its own. The script itself compares the losses of two ranks with those of one."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(EXAMPLES / "own_pytorch_model.py")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    # Python may end while a thread of PyTorch's gloo still frees the last collective's tensors; then gloo aborts.
    aborted_at_the_end = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted_at_the_end, done.stderr[-4000:]
    assert "all ranks  one rank" in done.stdout


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("it runs on CPUs")
def test_llama_context_parallel(two, monkeypatch, capsys):
    """The script itself compares losses and gradients."""
    pytest.importorskip("transformers")
    output = run_script(monkeypatch, capsys, EXAMPLES / "llama_context_parallel.py")
    assert two.rank > 0 or "gradients are equal" in output


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("it runs on CPUs")
def test_deepspeed_script(two, monkeypatch, capsys):
    """SGD's losses are one rank's without DeepSpeed, so the scale of the gradients is right."""
    deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # compiling it takes a minute
    output = run_script(monkeypatch, capsys, EXAMPLES / "deepspeed_script.py", "3")
    if two.rank == 0:
        losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
        assert losses == pytest.approx(alone(runpy.run_path(str(EXAMPLES / "deepspeed_script.py"))), rel=2e-6)


def test_linearize_llama(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    options = ["--small", "--folder", str(tmp_path), "--window", "8"]
    monkeypatch.setattr(sys, "argv", ["linearize_llama.py", *options])
    runpy.run_path(str(EXAMPLES / "linearize_llama.py"), run_name="__main__")
    *_, teacher, distilled = capsys.readouterr().out.splitlines()
    assert teacher.startswith("teacher: held-out loss ")
    assert distilled.startswith("distilled: held-out loss ")
    assert distilled.endswith("% at 1,024 tokens")


def test_harness_task(monkeypatch, capsys, tmp_path):
    """The script itself compares batches."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["harness_task.py", "--folder", str(tmp_path), "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "harness_task.py"), run_name="__main__")
    chosen, _, written = capsys.readouterr().out.splitlines()[-3:]
    assert chosen.startswith("town_chosen: acc,none ")
    assert written.startswith("town_written: exact_match,stripped ")


def alone(example) -> list[float]:
    """The losses of the DeepSpeed script's model on one rank, with a loop of PyTorch's own."""
    torch.manual_seed(0)
    model = example["Model"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seq, losses = SequenceParallel(None).sequence(example["TOKENS"]), []
    for _ in range(example["STEPS"]):
        text = torch.randint(example["VOCABULARY"], (1, example["TOKENS"] + 1))
        loss = torch.nn.functional.cross_entropy(model(text[:, :-1], seq)[0], text[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
