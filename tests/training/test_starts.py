"""A run knows how it was started, and goes on from that alone."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lasp import cli
from lasp.config import TrainConfig
from lasp.training.metrics import read_metrics
from lasp.training.recipes import RECIPES
from lasp.training.starts import keep_start, last_config
from lasp.training.train import train


@pytest.mark.parametrize("name", RECIPES)
def test_a_configuration_comes_back_from_json(name):
    config = replace(RECIPES[name](), allow_changed=("seed", "data"))
    assert TrainConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_what_is_no_configuration_is_refused():
    saved = asdict(RECIPES["quickstart"]())
    with pytest.raises(
        ValueError, match="TrainConfig: got .*'speed'.*, expected only its fields, model, data, run_dir"
    ):
        TrainConfig.from_dict(saved | {"speed": 1})
    with pytest.raises(ValueError, match="TrainConfig: got .*'steps'.*, expected all fields that have no default"):
        TrainConfig.from_dict({name: value for name, value in saved.items() if name != "steps"})
    with pytest.raises(ValueError, match="seed: got 'x'"):
        TrainConfig.from_dict(saved | {"seed": "x"})
    del saved["seed"]
    assert TrainConfig.from_dict(saved).seed == 0


def test_every_start_is_kept(config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lasp", "train", "x"])
    train(replace(config, steps=1))
    train(replace(config, steps=2))
    starts = [json.loads(line) for line in (Path(config.run_dir) / "starts.jsonl").read_text().splitlines()]
    assert [start["config"]["steps"] for start in starts] == [1, 2]
    assert {(*start["command"], start["ranks"], start["folder"]) for start in starts} == {
        ("lasp", "train", "x", 1, str(Path.cwd()))
    }
    assert {"lasp-sp", "python", "torch", "numpy"} <= starts[0]["versions"].keys()


def test_a_run_goes_on_from_another_place(config, tmp_path, monkeypatch):
    straight = replace(config, run_dir=str(tmp_path / "straight"), steps=4)
    train(straight)
    train(replace(config, steps=2, optimizer=replace(config.optimizer, schedule="wsd", decay_fraction=0.01)))
    moved = tmp_path / "else where"
    shutil.move(config.run_dir, moved)
    monkeypatch.chdir(moved)
    cli.main(["resume", ".", "--steps", "4", "--eval-every", "2"])
    steps = [record["step"] for record in read_metrics(moved) if "loss" in record]
    assert steps == [1, 2, 3, 4]
    assert last_config(str(moved)).steps == 4


def test_fields_may_follow(config, trained, tmp_path):
    keep_start(config, 2)
    keep_start(replace(config, seed=3, initial_weights="weights"), 2)
    with open(Path(config.run_dir) / "starts.jsonl", "a") as file:
        file.write('{"config": {')  # cut short by a crash
    cli.main(["resume", config.run_dir])
    cli.main(["resume", config.run_dir, "--parallel.sequence-parallel", "4", "--steps", "7"])
    first, second = trained
    assert first == replace(config, seed=3, initial_weights="weights")
    assert second == replace(first, steps=7, parallel=replace(first.parallel, sequence_parallel=4))


@pytest.mark.parametrize(
    ("text", "error"), [(None, "with starts.jsonl in it"), ("", "IndexError"), ("7\n", "TypeError")]
)
def test_what_is_no_run_is_refused(tmp_path, text, error):
    if text is not None:
        (tmp_path / "starts.jsonl").write_text(text)
    with pytest.raises(ValueError, match=error):
        cli.main(["resume", str(tmp_path)])


def test_initial_weights_are_not_needed_again(config, trained):
    train(replace(config, steps=1))
    keep_start(replace(config, initial_weights="gone"), 1)
    cli.main(["resume", config.run_dir])
    assert trained[0].initial_weights is None
