"""What `lasp train` is told to run: by a recipe's name, by one's own, by a file, with the model of given weights."""

from dataclasses import replace

import pytest
import torch

import lasp.training.train
from lasp import cli
from lasp.chosen import as_yaml
from lasp.models import Decoder, make_model
from lasp.training import checkpoint
from lasp.training.recipes import RECIPES

MODULE = '''
from dataclasses import replace
from torch import nn
from lasp.models import Decoder
from lasp.training.recipes import quickstart

def small():
    """Mine."""
    return replace(quickstart(), steps=3)

def other():
    return {"steps": 3}

class Mixer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

class Model(Decoder):
    pass
'''


@pytest.fixture
def trained(monkeypatch):
    """The configurations that `lasp train` was asked to run."""
    configs = []
    monkeypatch.setattr(lasp.training.train, "train", configs.append)
    return configs


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module in the working directory."""
    name = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_recipe_of_ones_own(trained, own):
    cli.main(["train", f"{own}:small", "--seed", "4"])
    assert trained == [replace(RECIPES["quickstart"](), steps=3, seed=4)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere_at_all:recipe",
            "recipe: got 'nowhere_at_all:recipe' (no module 'nowhere_at_all'), expected a module",
        ),
        ("OWN:absent", "recipe: got 'OWN:absent', expected a class or function in /"),
        ("sys:byteorder", "recipe: got 'sys:byteorder', expected a class or function in sys"),
        ("OWN:other", "recipe: got 'dict of OWN:other', expected a TrainConfig"),
        ("two words:x", "expected MODULE:NAME"),
    ],
)
def test_what_is_no_recipe_is_named(trained, own, name, message):
    with pytest.raises(ValueError) as raised:
        cli.main(["train", name.replace("OWN", own)])
    assert message in str(raised.value).replace(own, "OWN")
    assert not trained


@pytest.mark.parametrize("name", RECIPES)
def test_what_config_prints_is_what_a_file_says(trained, capsys, tmp_path, name):
    half = f"{RECIPES[name]().context_length // 2}:9"
    cli.main(["config", name.replace("_", "-"), "--seed", "7", "--curriculum", half])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    cli.main(["train", "--config", str(file), "--steps", "5"])
    assert trained == [replace(RECIPES[name](), seed=7, curriculum=(half,), steps=5)]
    assert as_yaml(replace(trained[0], steps=RECIPES[name]().steps)) == file.read_text()


def test_a_file_may_hold_what_differs_from_a_recipe(trained, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {lr: 3e-4}\ndata:\n  train: [a:0.7, b:0.3]\n")
    for words in (["quickstart", "--config", str(file)], ["quickstart", f"--config={file}"]):
        cli.main(["train", *words, "--steps", "9"])
    first, second = trained
    assert first == second
    assert (first.optimizer.lr, first.data.train, first.steps) == (3e-4, ("a:0.7", "b:0.3"), 9)
    assert first.optimizer.warmup_steps == RECIPES["quickstart"]().optimizer.warmup_steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5", "expected all fields that have no default"),
        ("speed: 5", "TrainConfig: got ['speed'], expected only its fields"),
        ("- steps", "expected a file of fields and their values"),
        ("a: [", "expected YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(trained, tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        cli.main(["train", "--config", str(file)])
    assert "run.yaml" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(("name", "kind"), [("mqar-small", "a sweep"), ("quality-small", "a table")])
def test_several_runs_have_no_file(name, kind, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 3")
    with pytest.raises(ValueError, match="config: got .*run.yaml', expected none with a sweep or a table"):
        cli.main(["train", name, "--config", str(file)])
    with pytest.raises(ValueError, match=f"recipe: got '{kind}', expected a recipe of one run"):
        cli.main(["config", name])


def test_initial_weights_bring_their_models_shape(trained, tmp_path):
    shape = replace(
        RECIPES["quickstart"]().model, vocab_size=300, hidden_size=32, num_layers=2, pattern="L", mixer="gla"
    )
    checkpoint.save_weights(tmp_path / "weights", Decoder(shape))
    cli.main(["train", "quickstart", "--initial-weights", str(tmp_path / "weights")])
    cli.main(["train", "quickstart", "--initial-weights", str(tmp_path / "weights"), "--model.init-std", "1"])
    assert [config.model for config in trained] == [shape, replace(shape, init_std=1.0)]


def test_the_recipes_are_listed(capsys):
    for words, code, out in ((["--help"], 0, "out"), ([], 2, "err")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", *words])
        assert stopped.value.code == code
        assert "quickstart-moe" in getattr(capsys.readouterr(), out)


def test_mixers_and_models_of_ones_own(own):
    shape = replace(RECIPES["quickstart"]().model, vocab_size=9, mixer=f"{own}:Mixer", model_class=f"{own}:Model")
    with torch.device("meta"):
        model = make_model(shape)
    assert type(model).__name__ == "Model"
    assert [type(layer.mixer).__name__ for layer in model.layers] == ["Mixer"] * 3 + ["SoftmaxMixer"]
    with pytest.raises(ValueError, match=r"mixer: got 'own\.x:Mixer'"), torch.device("meta"):
        make_model(replace(shape, mixer="own.x:Mixer"))
    with pytest.raises(ValueError, match="mixer: got 'gated', expected one of linear, .* or MODULE:CLASS"):
        replace(shape, mixer="gated")
