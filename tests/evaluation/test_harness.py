"""lm-evaluation-harness with lasp's model: the same numbers in batches and alone, on runs and on exports."""

import json
from contextlib import ExitStack

import pytest
import torch

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lasp import cli
from lasp.evaluation import harness
from lasp.training.generate import generate

TEXTS = ["line", "line 3 of a text\nline", "", "a much longer context, of which there is some more " * 3]


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture
def model(run, monkeypatch):
    """Makes models of the run, whose ranks part at the end."""
    with ExitStack() as stack:
        monkeypatch.setattr(harness, "_until_the_end", stack)
        yield lambda path=run.run_dir, **options: harness.HarnessModel(path, device="cpu", **options)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_give_what_each_text_gives_alone(model, batch_size):
    alone, together = model(), model(batch_size=batch_size)
    pairs = instances("loglikelihood", [(context, end) for context in TEXTS for end in (" 1", " of a text")])
    wholes = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    prompts = [(text, {"until": ["\n"], "max_gen_toks": 3 + i}) for i, text in enumerate(TEXTS)]
    for one, many in zip(alone.loglikelihood(pairs, True), together.loglikelihood(pairs, True), strict=True):
        assert one == pytest.approx(many, rel=1e-10)
    assert alone.loglikelihood_rolling(wholes, True) == pytest.approx(together.loglikelihood_rolling(wholes, True))
    same = [(text, {"until": ["\n"], "max_gen_toks": 7}) for text in TEXTS]
    for asked in (prompts, same):
        requests = instances("generate_until", asked)
        assert alone.generate_until(requests, True) == together.generate_until(requests, True)


def test_a_text_that_is_cut_into_windows(model):
    """Of 6 tokens that the model reads, the last window as far to the left as it may go."""
    ids = list(b"line 1 of a text")
    windows = [([256], ids[:6]), (ids[5:6], ids[6:12]), (ids[9:12], ids[12:])]
    short = model(max_length=6, batch_size=2)
    expected = sum(likelihood for likelihood, _ in harness.log_likelihoods(short.subject, windows))
    asked = instances("loglikelihood_rolling", [("line 1 of a text",)])
    assert short.loglikelihood_rolling(asked, True) == [pytest.approx(expected, rel=1e-10)]
    assert model().loglikelihood_rolling(asked, True) != [pytest.approx(expected, rel=1e-6)]


def test_a_long_context_loses_its_beginning(model):
    asked = instances("loglikelihood", [("a long context", " line")])
    (found,) = model(max_length=8).loglikelihood(asked, True)
    assert found == model().loglikelihood(instances("loglikelihood", [("text", " line")]), True)[0]


def test_continuations_are_those_of_generate_up_to_a_stop(model, run):
    text = "line 3 of"
    written = "".join(generate(run.run_dir, text, 12, temperature=0))
    ask = lambda **options: model().generate_until(instances("generate_until", [(text, options)]), True)[0]  # noqa: E731
    assert ask(until=[], max_gen_toks=12).startswith(written)
    assert ask(until=[written[2], "never"], max_gen_toks=12) == written[: written.index(written[2])]
    sampled = [ask(until=[], max_gen_toks=9, do_sample=True, temperature=1.0, top_p=0.9) for _ in range(2)]
    assert sampled[0] == sampled[1] != ask(until=[], max_gen_toks=9)


def test_a_task_on_a_run_and_on_its_export(model, run, tmp_path):
    pytest.importorskip("transformers")
    documents = [
        {"question": f"line {n} of a", "choices": [" text", " textbook, or so", " t"], "answer": n % 3}
        for n in range(9)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    cli.main(["export", run.run_dir, str(tmp_path / "export")])
    manager = TaskManager(include_defaults=False)

    def results(path, batch_size):
        evaluated = lm_eval.simple_evaluate(
            model=model(path, batch_size=batch_size), tasks=[task], task_manager=manager, bootstrap_iters=0
        )
        likelihoods = [
            float(found[0]) for sample in evaluated["samples"]["local"] for found in sample["filtered_resps"]
        ]
        return evaluated["results"]["local"]["acc,none"], likelihoods

    accuracy, likelihoods = results(run.run_dir, 1)
    assert len(likelihoods) == 27
    for path, batch_size in ((run.run_dir, 8), (str(tmp_path / "export"), 8)):
        again = results(path, batch_size)
        assert again[0] == accuracy
        assert again[1] == pytest.approx(likelihoods, rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size: got 'auto', expected a number of texts"),
        ({"max_length": 1}, "max_length: got 1, expected at least 2"),
        ({"path": "nowhere"}, "run_dir: got 'nowhere'"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_what_cannot_be_generated_is_refused(model):
    for options, message in (
        ({"num_beams": 3}, r"generation: got \{'num_beams': 3\}, expected until"),
        ({"max_gen_toks": 9}, "max_length: got 5, expected at least 10"),
    ):
        with pytest.raises(ValueError, match=message):
            model(max_length=5).generate_until(instances("generate_until", [("a", options)]), True)
    assert torch.distributed.is_initialized()
