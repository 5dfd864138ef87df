import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import lasp.training.train
from lasp import __version__, cli, text_commands
from lasp.config import MIXERS, TrainConfig
from lasp.training.recipes import RECIPES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_by_its_name(trained, name):
    cli.main(["train", name.replace("_", "-")])
    assert trained == [RECIPES[name]()]


def test_any_field_can_be_overridden(trained):
    top = "--steps 7 --dtype bfloat16 --batch-contexts 2 --recompute none --data.train elsewhere"
    model = "--model.hidden-size 64 --model.mixer kda --optimizer.schedule wsd --optimizer.betas 0.8 0.9"
    parallel = "--parallel.sequence-parallel 4 --parallel.data-parallel 2 --parallel.fsdp"
    cli.main(["train", "quickstart", *f"{top} {model} {parallel}".split()])
    (config,) = trained
    assert (config.steps, config.dtype, config.batch_contexts, config.recompute) == (7, "bfloat16", 2, "none")
    assert (config.model.hidden_size, config.model.mixer) == (64, "kda")
    assert (config.optimizer.schedule, config.optimizer.betas) == ("wsd", (0.8, 0.9))
    assert (config.parallel.sequence_parallel, config.parallel.data_parallel, config.parallel.fsdp) == (4, 2, True)
    assert config.data.train == "elsewhere"
    cli.main(["train", "quickstart", *["--data.train", "a:0.7", "b:0.3", "--curriculum", "1024:5", "--steps", "7"]])
    assert trained[-1].data.train == ("a:0.7", "b:0.3")
    assert (trained[-1].curriculum, trained[-1].steps) == (("1024:5",), 7)
    untouched = RECIPES["quickstart"]()
    assert (config.model.num_layers, config.optimizer.lr, config.seed) == (4, untouched.optimizer.lr, untouched.seed)


@pytest.mark.filterwarnings("ignore:get_parser")
def test_every_field_has_a_line_of_help_and_its_choices():
    config = RECIPES["quickstart"]()
    actions = tyro.extras.get_parser(TrainConfig, default=config)._actions
    assert [action.option_strings for action in actions if (action.help or "").startswith("(default")] == []
    options = {action.option_strings[0]: action for action in actions}
    assert len(options) > 70
    assert options["--model.router-scores"].choices == ("softmax", "sigmoid")
    assert all(mixer in options["--model.mixer"].metavar for mixer in MIXERS)


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


def shell(folder, *arguments, status=0):
    """The command in a process of its own, as a user would run it; what it printed, and its errors."""
    command = [sys.executable, "-m", "lasp.cli", *map(str, arguments)]
    where = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | where, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prepare nowhere --output x", "lasp: inputs: nowhere is not there; expected a file"),
        ("report nowhere", "lasp: [Errno 2] No such file or directory: 'nowhere/metrics.jsonl'"),
        ("import nowhere weights", "lasp: source: got 'nowhere', expected a directory"),
        ("train quickstart --data.train nowhere", "lasp: nowhere.idx is not there"),
        ("train quickstart --parallel.sequence-parallel 2", "lasp: sequence_parallel: got 2, expected a divisor"),
    ],
)
def test_every_command_says_in_a_line_what_is_wrong(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lasp", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.console()
    error = capsys.readouterr().err
    assert stopped.value.code == 1
    assert error.count("\n") == 1
    if arguments.startswith("train"):
        assert f"(traceback: {tmp_path}/runs/quickstart/ranks/traceback-0.txt)\n" in error
        told = (tmp_path / "runs/quickstart/ranks/traceback-0.txt").read_text()
        assert told.startswith("Traceback") and message.removeprefix("lasp: ") in told.replace(f"{tmp_path}/", "")
    assert message in error.replace(f"{tmp_path}/", "")


def test_bugs_keep_their_traceback(monkeypatch):
    """An error that lasp did not raise says nothing about what it was given."""

    def report(run_dir):
        int("no number")

    monkeypatch.setattr("lasp.training.report.report", report)
    monkeypatch.setattr(sys, "argv", ["lasp", "report", "run"])
    with pytest.raises(ValueError, match="no number"):
        cli.console()


def test_one_rank_speaks_and_torchrun_gets_the_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lasp", "generate", "nowhere"])
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}"))
        with pytest.raises(SystemExit):
            cli.console()
        assert capsys.readouterr().err.count("run_dir: got 'nowhere'") == (rank == 0)
        with pytest.raises(SystemExit):
            cli.main(["train", "quickstart", "--steps", "0"])
        assert capsys.readouterr().err.count("steps: got 0") == (rank == 0)
        recorded = json.loads((tmp_path / f"{rank}").read_text())["message"]
        assert "ValueError: run_dir: got 'nowhere'" in recorded["message"]
        assert "Traceback" in recorded["extraInfo"]["py_callstack"]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(text_commands, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"transformers: .*pip install 'lasp-sp\[huggingface\]'"):
        cli.main(["export", "run", "out"])


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lasp {__version__}\n"


def test_prepare_train_generate_report_from_a_shell(tmp_path, monkeypatch, capsys):
    """The whole path as a user would run it: in processes of their own, but for two that would show nothing new."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"line {number}\n" * 40)

    prepared = shell(tmp_path, "prepare", tmp_path, "--output", "data/lines", "--valid-fraction", 0.2).stdout
    assert "data/lines_valid: 6 documents" in prepared
    tiny = "--model.hidden-size 16 --model.num-heads 2 --model.intermediate-size 16 --context-length 256 --steps 3"
    where = "--data.train data/lines_train --data.valid data/lines_valid --run-dir run --data.eval-contexts 2"
    rest = "--optimizer.warmup-steps 1 --eval-every 2 --device cpu"
    assert "held-out loss" in shell(tmp_path, "train", "quickstart", *f"{tiny} {where} {rest}".split()).stdout
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 3

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    failed = shell(elsewhere, "generate", "run", status=1)
    assert failed.stderr == "lasp: run_dir: got 'run', expected a directory with a checkpoint in it\n"
    assert failed.stdout == ""
    monkeypatch.chdir(elsewhere)
    cli.main(["generate", "../run", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("The")
    cli.main(["report", "../run"])
    reported = capsys.readouterr().out
    assert "held-out loss after 3 steps" in reported
    assert "a bigram model's on the same tokens" in reported
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
