"""The launch scripts start what they say."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def script(name, *arguments, **environment):
    command = ["bash", str(ROOT / "launch" / name), *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_content(path):
    done = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def commands(tmp_path):
    """A PATH on which srun and scontrol write down what they were asked to do."""
    srun = 'printf "%s\\n" "$@" "$RUN_ID"; exit "${CODE:-0}"'
    scontrol = '[ "$1" = show ] && printf "node7\\nnode9\\n" || echo "$@"'
    for name, does in (("srun", srun), ("scontrol", scontrol)):
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
    assert script("slurm.sh", "quickstart", **job, CODE="1").returncode == 1
    stopped = script("slurm.sh", "quickstart", **job, CODE="75")
    assert stopped.stdout.splitlines()[-1] == "requeue 41"
    assert stopped.returncode == 75


@pytest.mark.parametrize("name", ["torchrun.sh", "megatron.sh"])
def test_the_environment_that_is_active_is_used(tmp_path, name):
    for command in ("lasp", "python"):
        (tmp_path / command).write_text('#!/bin/sh\necho "$0"\n')
        (tmp_path / command).chmod(0o755)
    done = script(name, 2, "quickstart", "--steps", 1, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout == f"{tmp_path}/python\n"


@pytest.mark.parametrize("name", ["torchrun.sh", "multinode.sh", "slurm.sh", "deepspeed.sh"])
def test_missing_arguments_are_explained(name):
    done = script(name)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
