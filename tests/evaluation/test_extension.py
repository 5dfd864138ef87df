"""A run's context extended: its stages, what they begin with, and needles before and after."""

import json
from dataclasses import replace

import pytest
import torch

from lasp import cli
from lasp.config import ModelConfig
from lasp.evaluation import needle
from lasp.evaluation.extension import Extension, extend
from lasp.models import Decoder
from lasp.training import checkpoint


def weights(path):
    model = Decoder(ModelConfig(**checkpoint.read_config(path)["model"])).double()
    checkpoint.load_model(path, model)
    return model.state_dict()


def test_stages_are_runs_at_longer_contexts(run):
    extension = Extension(model="there", output="out", factors=(4, 8), steps=20, data="long", lr=0.5)
    first, last = extension.stages(replace(run, batch_contexts=6, contexts_at_once=6, curriculum=("64:5",)))
    assert [stage.context_length for stage in (first, last)] == [1024, 2048]
    assert [(stage.batch_contexts, stage.contexts_at_once) for stage in (first, last)] == [(2, 1), (1, 1)]
    assert [stage.curriculum for stage in (first, last)] == [(), ()]
    assert [stage.run_dir for stage in (first, last)] == ["out/1024", "out/2048"]
    assert (first.data.train, first.data.valid, first.data.tokenizer) == ("long_train", "long_valid", "byte")
    assert (first.optimizer.lr, first.optimizer.min_ratio, last.optimizer.min_ratio) == (0.5, 1.0, 0.0)
    by_batches = replace(extension, length=64, data=None)  # contexts that are batches of short texts stay as long
    assert [stage.context_length for stage in by_batches.stages(run)] == [256, 512]
    assert by_batches.stages(run)[0].data == run.data


def test_positions():
    extension = Extension(model="there", output="out")
    theta = extension.theta(1e4, 64, 16)
    slowest = 62 / 64  # the exponent of the last pair's angle
    assert 16 * theta**-slowest == pytest.approx(1e4**-slowest)
    assert replace(extension, positions="keep").theta(1e4, 64, 16) == 1e4
    assert replace(extension, positions="none").theta(1e4, 64, 16) is None
    assert extension.theta(None, 64, 16) is None


@pytest.mark.parametrize("positions", ["scale", "none"])
def test_a_model_goes_on_at_longer_contexts(run, tmp_path, monkeypatch, positions):
    asked = []

    def answers(subject, prompts):
        theta = subject.model.config.rope_theta
        asked.extend((theta, len(prompt.ids)) for prompt in prompts)
        return [prompt.answers[0] if theta != run.model.rope_theta else "?" for prompt in prompts]

    monkeypatch.setattr(needle, "answers", answers)
    extension = Extension(
        model=run.run_dir,
        output=str(tmp_path / "long"),
        factors=(2, 3),
        length=300,
        steps=2,
        positions=positions,
        depths=(0.0, 1.0),
        samples=1,
    )
    result = extend(extension)
    assert result.model == str(tmp_path / "long/900")
    before, first = checkpoint.require_latest(run.run_dir), f"{tmp_path}/long/start-600"
    assert all(torch.equal(weight, weights(before)[name]) for name, weight in weights(first).items())
    one, two = (checkpoint.require_latest(tmp_path / "long" / length) for length in ("600", "900"))
    begun = weights(f"{tmp_path}/long/start-900")
    assert all(torch.equal(weight, weights(one)[name]) for name, weight in begun.items())
    assert any(not torch.equal(weight, begun[name]) for name, weight in weights(two).items())
    theta = checkpoint.read_config(two)["model"]["rope_theta"]
    assert theta == extension.theta(run.model.rope_theta, run.model.key_dim, 3)
    lengths = {300, 600, 900}
    for given in (run.model.rope_theta, theta):
        assert all(any(0 <= length - tokens < 100 for t, tokens in asked if t == given) for length in lengths)
    record = json.loads((tmp_path / "long/extension.json").read_text())
    assert record["needles"]["before"]["accuracy"] == 0
    assert record["needles"]["after"]["accuracy"] == 1
    assert list(record["losses"]) == ["600", "900"]
    rows = [line.split() for line in (tmp_path / "long/extension.txt").read_text().splitlines()]
    assert rows[1] == ["300", "0", "100"]
    assert rows[3] == ["900", "0", "100", f"{record['losses']['900']:.4f}"]
    assert (tmp_path / "long/extension.png").read_bytes().startswith(b"\x89PNG")

    # The same command again trains nothing.
    monkeypatch.setattr("lasp.training.train.compute_gradients", lambda *_: pytest.fail("a step was taken"))
    assert extend(extension).losses == result.losses


def test_the_command(monkeypatch):
    found = []
    monkeypatch.setattr("lasp.evaluation.extension.extend", found.append)
    cli.main(["extend", "runs/try", "--output", "runs/long", "--factors", "4", "32"])
    assert found == [Extension(model="runs/try", output="runs/long", factors=(4, 32))]


@pytest.mark.parametrize("factors", [(), (1,), (4, 2), (4, 4)])
def test_lengths_grow(factors):
    with pytest.raises(ValueError, match="factors: got .* expected growing numbers, from 2 on"):
        Extension(model="there", output="out", factors=factors)


def test_what_cannot_be_extended_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"run_dir: got .* expected the directory of a run, with starts\.jsonl"):
        extend(Extension(model=str(tmp_path), output=str(tmp_path / "long")))
    with pytest.raises(ValueError, match="context_length: got 270000, expected 1 to"):
        needles = {"samples": 1, "depths": (0.0,), "length": 300}
        extend(Extension(model=run.run_dir, output=str(tmp_path / "long"), factors=(900,), **needles))
