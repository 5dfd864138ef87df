import json
import os
import subprocess
import sys

import pytest

import lasp.training.train
from lasp import cli
from lasp.training.recipes import RECIPES


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `lasp train` was asked to run."""
    configs = []
    monkeypatch.setattr(lasp.training.train, "train", configs.append)
    return configs


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_by_its_name(trained, name):
    cli.main(["train", name.replace("_", "-")])
    assert trained == [RECIPES[name]()]


def test_any_field_can_be_overridden(trained):
    top = "--steps 7 --dtype bfloat16 --batch-contexts 2 --no-recompute --data.train elsewhere"
    model = "--model.hidden-size 64 --model.mixer kda --optimizer.schedule wsd --optimizer.betas 0.8 0.9"
    parallel = "--parallel.sequence-parallel 4 --parallel.data-parallel 2 --parallel.fsdp"
    cli.main(["train", "quickstart", *f"{top} {model} {parallel}".split()])
    (config,) = trained
    assert (config.steps, config.dtype, config.batch_contexts, config.recompute) == (7, "bfloat16", 2, False)
    assert (config.model.hidden_size, config.model.mixer) == (64, "kda")
    assert (config.optimizer.schedule, config.optimizer.betas) == ("wsd", (0.8, 0.9))
    assert (config.parallel.sequence_parallel, config.parallel.data_parallel, config.parallel.fsdp) == (4, 2, True)
    assert config.data.train == "elsewhere"
    untouched = RECIPES["quickstart"]()
    assert (config.model.num_layers, config.optimizer.lr, config.seed) == (4, untouched.optimizer.lr, untouched.seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train quickstart --model.hidden-size 65", "hidden_size: got 65"),
        ("train quickstart --steps 0", "steps: got 0"),
        ("train quickstart --optimizer.schedule sometimes", "sometimes"),
        ("train quickstart --no-such-field 1", "no-such-field"),
        ("train no-such-recipe", "no-such-recipe"),
        ("fly", "fly"),
    ],
)
def test_bad_command_lines_say_what_is_wrong(trained, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments.split())
    assert stopped.value.code != 0
    # The message is printed in a frame, which may break its lines anywhere.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not trained


def test_errors_of_a_command_are_not_the_command_lines(monkeypatch):
    def fails(config):
        raise ValueError("the data are gone")

    monkeypatch.setattr(lasp.training.train, "train", fails)
    with pytest.raises(ValueError, match="the data are gone"):
        cli.main(["train", "quickstart"])


def test_prepare_train_generate_report_from_a_shell(tmp_path):
    """The whole path in processes of their own, as a user would run it."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"line {number}\n" * 40)

    def lasp(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lasp.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    prepared = lasp("prepare", tmp_path, "--output", "data/lines", "--valid-fraction", 0.2)
    assert "data/lines_valid: 6 documents" in prepared
    tiny = "--model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16 --context-length 256 --steps 3"
    where = "--data.train data/lines_train --data.valid data/lines_valid --run-dir run --data.eval-contexts 2"
    rest = "--parallel.sequence-parallel 1 --optimizer.warmup-steps 1 --eval-every 2 --device cpu"
    assert "held-out loss" in lasp("train", "quickstart", *f"{tiny} {where} {rest}".split())
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3

    text = lasp("generate", "run", "--prompt", "line", "--tokens", 5, "--temperature", 0)
    assert text.startswith("line")
    reported = lasp("report", "run")
    assert "held-out loss after 3 steps" in reported
    assert "a bigram model's on the same tokens" in reported
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
