"""The launch scripts start what they say, and a run that loses a rank ends as one that does not."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lasp.config import ModelConfig
from lasp.data import TokenFileWriter
from lasp.models import Decoder
from lasp.training import checkpoint

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def script(name, *arguments, **environment):
    command = ["bash", str(ROOT / "launch" / name), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_content(path):
    done = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def commands(tmp_path):
    """A PATH on which srun and scontrol write down what they were asked to do."""
    for name, does in {"srun": 'printf "%s\\n" "$@" "$RUN_ID"', "scontrol": "printf 'node7\\nnode9\\n'"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_a_slurm_job_starts_one_launcher_a_node(commands):
    job = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7,9]", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "41"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": commands}
    done = script("slurm.sh", "quickstart", "--steps", 3, "--run-dir", "a b", **job)
    assert done.stdout.splitlines() == [
        *("--ntasks-per-node", "1", "--kill-on-bad-exit=1", "bash", f"{ROOT}/launch/multinode.sh"),
        *("2", "node7:29400", "8", "quickstart", "--steps", "3", "--run-dir", "a b"),
        "41",
    ]


@pytest.mark.parametrize("name", ["torchrun.sh", "multinode.sh", "slurm.sh", "deepspeed.sh"])
def test_missing_arguments_are_explained(name):
    done = script(name)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.fixture
def data(tmp_path):
    for split in ("train", "valid"):
        with TokenFileWriter(tmp_path / split, "uint16") as writer:
            for document in range(40):
                writer.add_document([*(b"line %d\n" % document * 8), 256])
    return tmp_path


class Nodes:
    """Two launchers on this machine, as if each were a node with one rank."""

    def __init__(self, data, run_dir):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            head = f"127.0.0.1:{free.getsockname()[1]}"
        shape = "--model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16 --context-length 128"
        where = f"--data.train {data}/train --data.valid {data}/valid --data.eval-contexts 2 --run-dir {run_dir}"
        how = "--steps 60 --eval-every 60 --checkpoint-every 5 --device cpu --parallel.timeout 60"
        command = ["bash", str(ROOT / "launch/multinode.sh"), "2", head, "1", "quickstart"]
        self.log = Path(f"{run_dir}.log")
        with self.log.open("w") as log:
            self.launchers = [
                subprocess.Popen([*command, *f"{shape} {where} {how}".split()], cwd=ROOT, stdout=log, stderr=log)
                for _ in range(2)
            ]

    def kill_a_rank(self):
        launcher = self.launchers[1].pid
        (worker,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        os.kill(int(worker), 9)

    def wait(self, seconds=240):
        for launcher in self.launchers:
            assert launcher.wait(timeout=seconds) == 0, self.log.read_text()[-4000:]

    def end(self):
        for launcher in self.launchers:
            launcher.terminate()  # it ends its rank
            launcher.wait()


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the rank in /proc")
def test_a_lost_rank_is_replaced_and_the_run_ends_as_ever(data, tmp_path):
    weights = []
    for name in ("interrupted", "straight"):
        run_dir = tmp_path / name
        nodes = Nodes(data, run_dir)
        try:
            if name == "interrupted":
                deadline = time.monotonic() + 240
                while not (run_dir / "checkpoints/latest").exists():
                    assert time.monotonic() < deadline, nodes.log.read_text()[-4000:]
                    time.sleep(0.02)
                nodes.kill_a_rank()
            nodes.wait()
        finally:
            nodes.end()
        went_on = "going on from the checkpoint of step" in nodes.log.read_text()
        assert went_on == (name == "interrupted")
        path = checkpoint.require_latest(run_dir)
        assert path.name == "step-00000060"
        model = Decoder(ModelConfig(**checkpoint.read_config(path)["model"]))
        checkpoint.load_model(path, model)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
