"""Held-out corpora: each has a loss of its own, in the metrics, in the lines and in the picture."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from lasp.data import TokenFile
from lasp.evaluation.reading import Reading
from lasp.training import checkpoint
from lasp.training.held_out import open_held_out
from lasp.training.metrics import read_metrics
from lasp.training.plot import plot
from lasp.training.train import train


def losses(run_dir):
    """The last evaluation's."""
    return [{n: x for n, x in r.items() if n != "step"} for r in read_metrics(run_dir) if "valid_loss" in r][-1]


@pytest.fixture
def config(config):
    return replace(config, steps=1, eval_every=1)


def test_each_corpus_has_a_loss_of_its_own(config, tmp_path, capsys, monkeypatch):
    data, alone = config.data, {}
    for name in ("train", "valid"):
        one = replace(config, data=replace(data, valid=getattr(data, name)), run_dir=str(tmp_path / name))
        assert train(one) == losses(one.run_dir)["valid_loss"]
        assert losses(one.run_dir).keys() == {"valid_loss"}
        alone[name] = losses(one.run_dir)["valid_loss"]
    both = replace(config, data=replace(data, valid=(f"{data.valid}:3", f"{data.train}:1")))
    capsys.readouterr()
    mean = train(both)
    assert losses(both.run_dir) == {"valid_loss": mean} | {f"valid_loss/{name}": x for name, x in alone.items()}
    assert mean == pytest.approx((3 * alone["valid"] + alone["train"]) / 4)
    told = f"held-out loss {mean:.4f} (valid {alone['valid']:.4f}, train {alone['train']:.4f})"
    said = " ".join(capsys.readouterr().out.split())
    assert f"step 1: loss {read_metrics(both.run_dir)[0]['loss']:.4f}, {told}" in said
    assert f"finished 1 of 1 steps: {told}, checkpoint" in said
    assert train(both) == mean  # of a run that is finished

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot([both.run_dir])
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert legend == ["run", "train", "valid"]


def test_without_weights_a_corpus_weighs_as_much_as_it_has_tokens(config, tmp_path):
    data = config.data
    config = replace(config, data=replace(data, valid=(data.valid, data.train)))
    mean = train(config)
    found = losses(config.run_dir)
    low, high = sorted((found["valid_loss/train"], found["valid_loss/valid"]))
    assert low < mean < high
    assert abs(mean - found["valid_loss/train"]) < abs(mean - found["valid_loss/valid"])  # which has more


def test_other_corpora_or_weights_are_another_runs(config):
    data = config.data
    both = replace(config, data=replace(data, valid=(f"{data.valid}:3", f"{data.train}:1")))
    train(both)
    other = replace(both, steps=2, data=replace(data, valid=(f"{data.valid}:1", f"{data.train}:1")))
    with pytest.raises(ValueError, match=r"data\.valid"):
        train(other)
    assert checkpoint.require_latest(both.run_dir).name == "step-00000001"


def test_a_corpus_is_named_by_its_whole_path_if_others_end_alike(config, tmp_path):
    data, alike = config.data, tmp_path / "other"
    alike.mkdir()
    for suffix in (".bin", ".idx"):
        (alike / f"valid{suffix}").symlink_to(f"{data.train}{suffix}")
    config = replace(config, data=replace(data, valid=(data.valid, str(alike / "valid"))))
    train(config)
    assert losses(config.run_dir).keys() == {"valid_loss", f"valid_loss/{data.valid}", f"valid_loss/{alike / 'valid'}"}


@pytest.mark.parametrize("valid", [(), ("a", "a"), ("a:1", "b"), ("a:0", "b:1")])
def test_corpora_that_are_none_are_refused(config, valid):
    with pytest.raises(ValueError, match=r"^data\.valid: got"):
        replace(config.data, valid=valid)


def test_evaluations_want_one_of_several_named(config):
    origin = SimpleNamespace(data=replace(config.data, valid=("a:2", "b:1")), context_length=8)
    asked = SimpleNamespace(length=lambda _: 8, texts=(), data=None)
    with pytest.raises(ValueError, match=r"^data: got None, expected one of the run's held-out corpora .*: a:2 b:1$"):
        Reading._all(asked, SimpleNamespace(origin=origin))


def test_if_the_number_is_left_open_few_contexts_will_do(config):
    data = replace(config.data, eval_contexts=None)
    there = TokenFile(data.valid).num_tokens // config.context_length
    for length, groups, count in ((config.context_length, 1, min(8, there)), (8, 3, 6), (8, 16, 16)):
        (corpus,), _ = open_held_out(replace(config, data=data, context_length=length), groups)
        assert len(corpus.contexts) == count
    with pytest.raises(
        ValueError, match=f"data.valid: got '{there} contexts in .*valid', expected {there + 1}, one for"
    ):
        open_held_out(replace(config, data=data), there + 1)
