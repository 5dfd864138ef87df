"""Loss by position and accuracy on labels, against the plain computation from logits, on runs and on exports."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lasp import cli
from lasp.data import IGNORED, PackedContexts, TokenFile, TokenFileWriter
from lasp.evaluation.contexts import text_contexts, whole_documents
from lasp.evaluation.evaluate import evaluate
from lasp.evaluation.labels import Labels, file_accuracy
from lasp.evaluation.position import LossByPosition, interval_edges
from lasp.evaluation.subject import read_model
from lasp.parallel import SequenceParallel


def plain(subject, tokens, labels):
    """(loss, whether the likeliest token is right) at each label of a document, by its position."""
    logits = subject.model(tokens[None], SequenceParallel(None).sequence(len(tokens)))[0]
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").tolist()
    right = (logits.argmax(-1) == labels).tolist()
    return {i: (losses[i], right[i]) for i, label in enumerate(labels.tolist()) if label != IGNORED}


@torch.no_grad()
def test_loss_by_position(subject, run):
    result = LossByPosition(model=run.run_dir, context_length=200).run(subject)
    at: dict[int, list] = {}
    for context in PackedContexts(run.data.valid, 200, seed=0, shuffle=False).one_epoch():
        for start, stop in pairwise(context.cu_seqlens.tolist()):
            for position, found in plain(subject, context.tokens(start, stop), context.labels(start, stop)).items():
                at.setdefault(position, []).append(found)
    assert sum(interval.labels for interval in result.intervals) == sum(map(len, at.values()))
    for interval in result.intervals:
        inside = [one for position in range(interval.first, interval.last + 1) for one in at.get(position, [])]
        assert interval.labels == len(inside)
        assert interval.loss == pytest.approx(sum(loss for loss, _ in inside) / len(inside), rel=1e-10)
        assert interval.accuracy == pytest.approx(sum(right for _, right in inside) / len(inside), abs=1e-12)
        assert interval.perplexity == pytest.approx(math.exp(interval.loss))
    everything = [loss for values in at.values() for loss, _ in values]
    assert result.loss == pytest.approx(sum(everything) / len(everything), rel=1e-10)
    assert "all" in result.table()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 1024, 131_072])
def test_intervals_cover_every_position(length):
    edges = interval_edges(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert all(a < b for a, b in pairwise(edges))
    assert len(edges) <= 4 * math.log2(length) + 3


def test_a_context_of_texts_is_each_text_once(tmp_path, subject):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("x" * 25)
    texts[1].write_text("größer")
    contexts = list(text_contexts([str(path) for path in texts], subject.tokenizer, 10))
    assert [context.length for context in contexts] == [10, 10, 5, 8]
    assert [context.count_labels() for context in contexts] == [10, 10, 4, 7]
    assert bytes(contexts[-1].tokens(0, 8).tolist()).decode() == "größer"
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"texts: got .*c\.txt .*expected UTF-8"):
        list(text_contexts([str(tmp_path / "c.txt")], subject.tokenizer, 10))
    (tmp_path / "c.txt").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"expected a text of at least two tokens"):
        list(text_contexts([str(tmp_path / "c.txt")], subject.tokenizer, 10))


@pytest.fixture
def masked(tmp_path):
    with TokenFileWriter(tmp_path / "masked", "uint16", masked=True) as writer:
        for length in (5, 5, 5, 9, 30, 2):
            writer.add_document(torch.randint(0, 257, (length,)).numpy(), (torch.rand(length) < 0.7).numpy())
        writer.add_document([1, 2, 3], [0, 1, 1])
    return str(tmp_path / "masked")


@pytest.mark.parametrize("tokens", [1, 10, 16, 1000])
def test_every_document_is_read_once_and_whole(masked, tokens):
    file = TokenFile(masked)
    contexts = list(whole_documents(file, tokens, 257))
    lengths = [stop - start for c in contexts for start, stop in pairwise(c.cu_seqlens.tolist())]
    assert lengths == [5, 5, 5, 9, 30, 2, 3]
    assert all(c.length <= tokens or len(c.cu_seqlens) == 2 for c in contexts)
    assert torch.cat([c.tokens(0, c.length) for c in contexts]).tolist() == file.tokens.tolist()
    assert sum(c.count_labels() for c in contexts) == sum((c.labels(0, c.length) != IGNORED).sum() for c in contexts)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [15, 1000])
def test_accuracy_on_labels(masked, subject, tokens):
    file = TokenFile(masked)
    expected = []
    for context in whole_documents(file, 1, 257):
        expected += plain(subject, context.tokens(0, context.length), context.labels(0, context.length)).values()
    found = file_accuracy(subject, file, tokens)
    assert found.labels == len(expected)
    assert found.accuracy == pytest.approx(sum(right for _, right in expected) / len(expected), abs=1e-12)
    assert found.loss == pytest.approx(sum(loss for loss, _ in expected) / len(expected), rel=1e-10)


def test_an_export_is_evaluated_as_its_run(tmp_path, run, capsys):
    pytest.importorskip("transformers")
    cli.main(["export", run.run_dir, str(tmp_path / "export")])
    ours = evaluate(LossByPosition(model=run.run_dir, device="cpu", output=str(tmp_path / "ours")))
    arguments = f"--data {run.data.valid} --context-length 256 --device cpu".split()
    cli.main(["eval", "loss", str(tmp_path / "export"), *arguments])
    folder = tmp_path / "export/evaluation"
    theirs = json.loads((folder / "loss.json").read_text())
    assert theirs["loss"] == pytest.approx(ours.loss, rel=1e-10)
    assert (folder / "loss.txt").read_text().rstrip() in capsys.readouterr().out
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_model(str(tmp_path / "export")).eod == "<|endoftext|>"


def test_labels_from_the_command_line(tmp_path, run, masked):
    cli.main(
        ["eval", "labels", run.run_dir, "--data", masked, run.data.valid, "--device", "cpu", "--output", str(tmp_path)]
    )
    assert set(json.loads((tmp_path / "labels.json").read_text())) == {masked, run.data.valid}
    assert (tmp_path / "labels.png").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "nowhere"}, "run_dir: got 'nowhere', expected a directory with a checkpoint"),
        ({"texts": ("a",), "data": "b"}, "data: got 'b', expected None beside texts"),
        ({"contexts": 0}, "contexts: got 0, expected at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(LossByPosition(**{"model": run.run_dir, "device": "cpu", **settings}))


def test_an_export_needs_its_data_named(tmp_path, run, monkeypatch):
    pytest.importorskip("transformers")
    cli.main(["export", run.run_dir, str(tmp_path / "export")])
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"transformers: got .*lasp-sp\[huggingface\]"):
        patch.setattr("lasp.evaluation.subject.find_spec", lambda name: None)
        read_model(str(tmp_path / "export"))
    for settings, message in (
        ({}, "context_length: got None"),
        ({"context_length": 64}, "data: got None, expected token"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(LossByPosition(model=str(tmp_path / "export"), device="cpu", **settings))
    with pytest.raises(ValueError, match="data: got .* expected at least one prefix"):
        evaluate(Labels(model=run.run_dir, device="cpu", data=()))
    assert not Path(run.run_dir, "evaluation").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_evaluated(tmp_path, run, monkeypatch):
    def run_it(*_):
        raise AssertionError("evaluated in vain")

    monkeypatch.setattr(LossByPosition, "run", run_it)
    taken = tmp_path / "a file"
    taken.touch()
    with pytest.raises(ValueError, match="output: got .*a file.*expected a directory to write to"):
        evaluate(LossByPosition(model=run.run_dir, device="cpu", output=str(taken / "below")))
