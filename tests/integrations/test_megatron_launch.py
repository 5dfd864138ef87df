"""Megatron programs as users start them: the example, and training that goes on elsewhere."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from lasp.data import TokenFileWriter
from lasp.integrations import megatron_weights
from lasp.integrations.megatron.train import Training
from lasp.training.stop import EXIT_CODE
from tests.parallel.scripts import run_script
from tests.parallel.test_benchmarks import ended_well
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(two, monkeypatch, capsys):
    """Runs a program of the repository in the ranks of this launch; the result is what rank 0 prints."""

    def run(path: str, *arguments: str) -> str:
        parallel_state.destroy_model_parallel()
        output = [run_script(monkeypatch, capsys, ROOT / path, *arguments)]
        dist.broadcast_object_list(output)
        return output[0]

    return run


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\S+)", output)]


def test_example_learns():
    """In processes of its own, which compile nothing of Megatron's."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/megatron_two_lines.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended_well(done), done.stderr[-3000:]
    seen = losses(done.stdout)
    assert len(seen) == 10
    assert seen[-1] < seen[0]


def write_data(two, folder, gen) -> str:
    """Documents of random bytes."""
    if two.rank == 0:
        with TokenFileWriter(folder / "data", np.uint16) as writer:
            for _ in range(8):
                writer.add_document(torch.randint(256, (200,), generator=gen).numpy())
    two.barrier("data is written")
    return str(folder / "data")


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("its shapes are for CPUs")
def test_training_goes_on_over_another_mesh(two, program, shared_tmp_path, gen, monkeypatch):
    """The second half on tensor-parallel ranks gives the losses of a run that stayed on context-parallel ones.

    A signal to one rank ends the first half.
    """
    run = ["launch/megatron_rank.py", "--preset", "tiny", "--data", write_data(two, shared_tmp_path, gen)]
    run += ["--run-dir", str(shared_tmp_path / "run"), "--steps", "4", "--sequence-length", "64", "--save-every", "2"]
    run += ["--lr", "0.01", "--warmup-steps", "0"]
    whole = losses(program(*run, "--context-parallel", "2"))
    assert len(whole) == 4
    assert whole[-1] < whole[0]
    run[run.index("--run-dir") + 1] = str(shared_tmp_path / "stopped")
    with monkeypatch.context() as patch:
        step = Training.step

        def told_to_stop(training, dataset, number):
            if two.rank == 1 and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(training, dataset, number)

        patch.setattr(Training, "step", told_to_stop)
        with pytest.raises(SystemExit) as stopped:
            program(*run, "--context-parallel", "2", "--save-every", "9")
    assert stopped.value.code == EXIT_CODE
    two.barrier("the run has stopped")
    halves = losses(program(*run, "--tensor-parallel", "2"))  # the output of the first, too
    assert halves == pytest.approx(whole, abs=2e-4)  # printed with four digits

    weights = str(shared_tmp_path / "run" / "checkpoints" / "step_4")
    assert megatron_weights.load(weights).config.pattern == "LLLN"
    run[run.index("--run-dir") + 1] = str(shared_tmp_path / "another")
    begun = losses(program(*run, "--context-parallel", "2", "--initial-weights", weights))
    assert begun[0] < whole[0]


@pytest.mark.mpi
@pytest.mark.no_exchange
@pytest.mark.cpu_only("its shapes are for CPUs")
def test_what_is_damaged_or_not_finite_is_refused(two, program, shared_tmp_path, gen, monkeypatch):
    run = ["launch/megatron_rank.py", "--preset", "tiny", "--data", write_data(two, shared_tmp_path, gen)]
    run += ["--run-dir", str(shared_tmp_path / "run"), "--sequence-length", "64", "--warmup-steps", "0"]
    program(*run, "--steps", "1")
    step, checkpoints = Training.step, shared_tmp_path / "run" / "checkpoints"

    def spoiled(training, dataset, number):
        loss = step(training, dataset, number)
        if two.rank == 1:
            next(training.model.module.parameters()).data.view(-1)[0] = math.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", spoiled)
        with pytest.raises(FloatingPointError, match=r"^rank 1: \S+: got values from nan to nan"):
            program(*run, "--steps", "2")
    assert (checkpoints / "latest").read_text() == "step_1"
    if two.rank == 0:
        damaged = sorted((checkpoints / "step_1").glob("*.distcp"))[0]
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    two.barrier("a file is damaged")
    with pytest.raises(ValueError, match=r"got a damaged \S+\.distcp"):
        program(*run, "--steps", "2")
