"""Needle tests and RULER from their prompts to their tables, with the model's own answers and with right ones."""

import json

import numpy as np
import pytest
import torch

from lasp import cli
from lasp.evaluation import needle, ruler, writing
from lasp.evaluation.evaluate import evaluate
from lasp.evaluation.needle import Needle
from lasp.evaluation.prompts.prompt import Prompt
from lasp.evaluation.ruler import Ruler
from lasp.evaluation.writing import answers
from lasp.training.generate import generate


def prompt(text, room, *answers):
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return Prompt(ids, answers, room, np.array([32, 49]))


def test_an_answer_is_the_greedy_continuation(subject, run):
    text = "line 3 of"
    written = "".join(generate(run.run_dir, text, 12, temperature=0))
    prompts = [prompt(text, 12, "\0"), prompt(text, 12, written[:2]), prompt(text, 3, "\0")]
    whole, found, short = answers(subject, prompts)
    assert whole.startswith(written)  # it may end within a character
    assert len(written) > 3
    assert found.startswith(written[:2])
    assert len(found) < len(written)  # all that was asked for is said
    assert len(short) <= 3


def test_prompts_are_answered_together_and_as_alone(subject, monkeypatch):
    prompts = [prompt("line 3 of a text\n" * n, 9, "\0") for n in (3, 1, 2, 1)]
    (*alone,) = (text for one in prompts for text in answers(subject, [one]))
    read, real = [], writing.write
    monkeypatch.setattr(writing, "write", lambda model, ids, *rest: read.append(len(ids)) or real(model, ids, *rest))
    assert answers(subject, prompts) == alone
    monkeypatch.setattr(writing, "TOGETHER", 3 * len(prompts[1].ids))
    assert answers(subject, prompts) == alone
    assert read == [4, 1, 2, 1]
    assert answers(subject, []) == []


def right_below(depth):
    """Instead of the model: right where the needle is above that depth, else wrong."""

    def write(subject, prompt):
        text = subject.tokenizer.decode(prompt.ids)
        return f"It is {prompt.answers[0]}" if text.index(f"{prompt.answers[0]}.") < depth * len(text) else "?"

    return lambda subject, prompts: [write(subject, prompt) for prompt in prompts]


def first_answers(subject, prompts):
    return [prompt.answers[0] for prompt in prompts]


def test_a_heat_map_by_depth_and_length(tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(needle, "answers", right_below(0.6))
    options = "--lengths 4000 3000 --depths 1 0 0.4 --samples 2 --device cpu --kind keys"
    cli.main(["eval", "needle", run.run_dir, *options.split(), "--output", str(tmp_path)])
    record = json.loads((tmp_path / "needle.json").read_text())
    found = {(one["length"], one["depth"]): one["accuracy"] for one in record["found"]}
    assert found == {(length, depth): float(depth < 0.6) for length in (3000, 4000) for depth in (0, 0.4, 1)}
    assert record["accuracy"] == pytest.approx(2 / 3)
    rows = [line.split() for line in (tmp_path / "needle.txt").read_text().splitlines()]
    assert rows == [
        ["keys:", "depth", "3,000", "4,000"],
        ["0%", "100", "100"],
        ["40%", "100", "100"],
        ["100%", "0", "0"],
        ["mean", "67", "67"],
    ]
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert "mean" in capsys.readouterr().out


def test_several_values_count_in_parts(run, monkeypatch):
    monkeypatch.setattr(needle, "answers", first_answers)
    evaluation = Needle(
        model=run.run_dir, device="cpu", kind="values", several=4, lengths=(1500,), depths=(0.5,), samples=1
    )
    monkeypatch.setattr("lasp.evaluation.evaluate.save", lambda *_: "")
    assert evaluate(evaluation).record()["accuracy"] == 0.25


def test_ruler_by_task_and_length(tmp_path, run, monkeypatch):
    monkeypatch.setattr(ruler, "answers", first_answers)
    options = "--tasks vt niah_single_1 --lengths 2000 1500 --samples 2 --device cpu"
    cli.main(["eval", "ruler", run.run_dir, *options.split(), "--output", str(tmp_path)])
    record = json.loads((tmp_path / "ruler.json").read_text())
    assert record["mean"] == pytest.approx({"1500": 0.6, "2000": 0.6})
    assert [(one["task"], one["length"], one["score"]) for one in record["scores"]] == [
        ("vt", 1500, 0.2),
        ("vt", 2000, 0.2),
        ("niah_single_1", 1500, 1.0),
        ("niah_single_1", 2000, 1.0),
    ]
    assert (tmp_path / "ruler.txt").read_text().splitlines()[-1].split() == ["mean", "60.0", "60.0"]
    assert (tmp_path / "ruler.png").exists()


def test_the_model_is_asked(run, monkeypatch):
    monkeypatch.setattr("lasp.evaluation.evaluate.save", lambda *_: "")
    result = evaluate(Needle(model=run.run_dir, device="cpu", lengths=(600,), depths=(0.5,), samples=1))
    assert result.record()["accuracy"] == 0  # after two steps
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (lambda run: Needle(model=run, lengths=(200,)), "lengths: got 200, expected more than the"),
        (lambda run: Needle(model=run, lengths=()), r"lengths: got \(\), expected at least one"),
        (
            lambda run: Needle(model=run, depths=(1.5,)),
            r"depths: got \(1\.5,\), expected a tuple of a number in \[0, 1\]",
        ),
        (lambda run: Needle(model=run, kind="some"), "kind: got 'some'"),
        (lambda run: Ruler(model=run, tasks=("qa_1",)), "tasks: got 'qa_1', expected one of niah_single_1"),
        (lambda run: Ruler(model=run, tasks=("cwe",), lengths=(1000,)), "lengths: got .* tokens for a list"),
    ],
)
def test_what_cannot_be_asked_is_refused(run, evaluation, message):
    with pytest.raises(ValueError, match=message):
        evaluate(evaluation(run.run_dir))
