"""A softmax model made linear: what each stage minimises and trains, and the command from a directory to a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lasp import cli
from lasp.config import DataConfig, ModelConfig
from lasp.distillation.config import Distillation, StageConfig
from lasp.distillation.low_rank import LowRank, adapt, merge
from lasp.distillation.matching import Matching
from lasp.distillation.student import Student
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.generate import generate
from tests.training import conftest

transformers = pytest.importorskip("transformers")

from lasp.distillation.run import RESULT
from lasp.integrations.huggingface import to_huggingface
from lasp.integrations.huggingface.tokenizer import export_tokenizer
from lasp.integrations.llama import from_llama, to_llama

data = conftest.data
SHAPE = replace(tiny("gla", "LN"), vocab_size=257, value_head_dim=None, init_std=0.2, feature_map="hedgehog", window=3)
TEACHER = replace(SHAPE, pattern="N", feature_map=None, window=None)
DOCUMENTS = torch.tensor([0, 7, 19])


@pytest.fixture
def teacher():
    return Decoder(TEACHER).double().eval()


def batch(vocabulary=257):
    tokens = torch.randint(0, vocabulary, (1, 19))
    labels = torch.randint(0, vocabulary, (1, 19)).where(torch.rand(1, 19) < 0.8, -100)
    return tokens, labels, SequenceParallel(None).sequence(19, DOCUMENTS)


def copied(kind, teacher):
    """A student of that kind with the teacher's weights, as an import gives them."""
    student = kind(SHAPE).double()
    first = from_llama(to_llama(teacher), pattern="LN", mixer="gla", feature_map="hedgehog", window=3)
    student.load_state_dict(first.double().state_dict())
    return student


def test_matching_compares_mixers_on_the_teachers_inputs(teacher):
    student = copied(Matching, teacher)
    student.follow(teacher)
    tokens, labels, seq = batch()
    loss, count = student(tokens, seq, labels=labels)
    x, expected = teacher.embedding(tokens), 0
    for its, own, letter in zip(teacher.layers, student.layers, SHAPE.layers, strict=True):
        if letter == "L":
            normed = its.mixer_norm(x)
            distance = (own.mixer(normed, seq) - its.mixer(normed, seq)).square().sum(-1)
            expected = expected + distance[labels != -100].sum()
        x, _ = its(x, seq)
    assert count == (labels != -100).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    for name, parameter in student.named_parameters():
        _, layer, part, *_ = [*name.split("."), "", ""]
        linear = part == "mixer" and SHAPE.layers[int(layer)] == "L"
        assert parameter.requires_grad == linear, name
        assert (parameter.grad is not None) == linear, name


@pytest.mark.parametrize("kind", [Matching, Student])
def test_in_evaluation_a_student_is_a_decoder_like_any_other(teacher, kind):
    student, plain = copied(kind, teacher).eval(), Decoder(SHAPE).double()
    assert list(student.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(student.state_dict())
    tokens, labels, seq = batch()
    for got, expected in zip(student(tokens, seq, labels=labels), plain(tokens, seq, labels=labels), strict=True):
        assert torch.equal(got, expected)


def test_a_student_is_told_by_the_teacher_and_the_labels(teacher):
    student = copied(Student, teacher)
    student.follow(teacher, stage(divergence=0.7, cross_entropy=0.2, temperature=2.0))
    tokens, labels, seq = batch()
    kept = (labels != -100).flatten().nonzero()[:, 0]
    logits, wanted = student(tokens, seq)[0, kept], teacher(tokens, seq)[0, kept]
    told = F.kl_div((logits / 2).log_softmax(-1), (wanted / 2).log_softmax(-1), log_target=True, reduction="sum")
    expected = 0.7 * 4 * told + 0.2 * F.cross_entropy(logits, labels[0, kept], reduction="sum")
    for scored in (None, kept):
        loss, count = student(tokens, seq, labels=labels, scored=scored)
        assert count == len(kept)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not any("teacher" in name for name in student.state_dict())


def stage(**told):
    settings = {"stage": "distill", "rank": 2, "steps": 1, "context_length": 19, "run_dir": "there", "model": SHAPE}
    return StageConfig(**settings, data=DataConfig(train="a", valid="b"), **told)


def test_adapters_are_small_and_become_a_part_of_the_weights():
    decoder = Decoder(SHAPE).double()
    tokens, _, seq = batch()
    before, names = decoder(tokens, seq), list(decoder.state_dict())
    adapt(decoder, 2)
    assert torch.equal(decoder(tokens, seq), before)
    trained = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    assert not any(".original" in name or "embedding" in name or "norm.weight" in name[:20] for name in trained)
    assert any("k_features" in name for name in trained)
    for parameter in trained.values():
        parameter.data.add_(torch.randn_like(parameter) / 10)
    adapted = decoder(tokens, seq)
    assert (adapted - before).abs().max() > 1e-2
    merge(decoder)
    assert list(decoder.state_dict()) == names
    assert (decoder(tokens, seq) - adapted).abs().max() <= 1e-10


def test_rank_0_trains_everything():
    decoder = Decoder(SHAPE)
    adapt(decoder, 0)
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(isinstance(module, LowRank) for module in decoder.modules())


@pytest.fixture
def llama(tmp_path):
    """The directory of a Llama on bytes."""
    decoder, folder = Decoder(TEACHER), str(tmp_path / "llama")
    to_llama(decoder, eos_token_id=256).save_pretrained(folder)
    export_tokenizer("byte").save_pretrained(folder)
    return folder


@pytest.fixture
def prefix(data, tmp_path):
    for split in ("train", "valid"):
        for suffix in (".bin", ".idx"):
            Path(f"{tmp_path}/data_{split}{suffix}").symlink_to(f"{getattr(data, split)}{suffix}")
    return f"{tmp_path}/data"


def options(prefix, *more):
    small = ["--context-length", "96", "--eval-contexts", "2", "--dtype", "float32", "--device", "cpu"]
    layers = ["--pattern", "LN", "--mixer", "gla", "--feature-map", "hedgehog", "--window", "3"]
    return ["--distill", prefix, *layers, *small, "--parallel.no-fsdp", *more]


def weights(run_dir):
    return weights_of(checkpoint.require_latest(run_dir))


def weights_of(path):
    model = Decoder(ModelConfig(**checkpoint.read_config(path)["model"]))
    checkpoint.load_model(path, model)
    return model.state_dict()


def test_from_a_llama_to_a_run(llama, prefix, tmp_path, capsys, monkeypatch):
    output = str(tmp_path / "linear")
    command = ["import", llama, output, *options(prefix, "--match-steps", "30", "--match-lr", "1e-2", "--steps", "8")]
    cli.main(command)
    losses = json.loads(Path(output, RESULT).read_text())
    assert losses["distilled"] < losses["matched"]
    records = [json.loads(line) for line in Path(output, "matched/metrics.jsonl").read_text().splitlines()]
    distances = [record["loss"] for record in records if "loss" in record]
    assert distances[-1] < distances[0] / 2
    lines = capsys.readouterr().out
    assert f"teacher: held-out loss {losses['teacher']:.4f}" in lines
    first, matched = weights_of(f"{output}/start"), weights(f"{output}/matched")
    changed = {name for name, weight in first.items() if not torch.equal(weight, matched[name])}
    assert changed and all(name.startswith(("layers.0.mixer.", "layers.2.mixer.")) for name in changed)

    # What comes out is a run like any other.
    cli.main(["eval", "loss", output, "--device", "cpu", "--contexts", "2"])
    found = json.loads(Path(output, "evaluation/loss.json").read_text())
    assert found["loss"] == pytest.approx(losses["distilled"], rel=1e-4)
    cli.main(
        [
            "eval",
            "loss",
            llama,
            "--device",
            "cpu",
            "--contexts",
            "2",
            "--data",
            f"{prefix}_valid",
            "--context-length",
            "96",
        ]
    )
    found = json.loads(Path(llama, "evaluation/loss.json").read_text())
    assert found["loss"] == pytest.approx(losses["teacher"], rel=1e-4)
    assert isinstance("".join(generate(output, "alpha", 3)), str)
    cli.main(["export", output, str(tmp_path / "hf")])

    # The same command again trains nothing.
    before = weights(output)
    monkeypatch.setattr("lasp.training.train.compute_gradients", lambda *_: pytest.fail("a step was taken"))
    cli.main(command)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(output).items())


def test_a_first_stage_may_be_left_out(llama, prefix, tmp_path):
    output = tmp_path / "linear"
    cli.main(["import", llama, str(output), *options(prefix, "--match-steps", "0", "--steps", "1", "--rank", "0")])
    assert not (output / "matched").exists()
    assert "matched" not in json.loads((output / RESULT).read_text())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--feature-map", "relu", "--mixer", "kda"], "feature_map: got 'relu', expected None with mixer='kda'"),
        (["--pattern", "NN"], "pattern: got 'NN', expected at least one L"),
        (["--pattern", "LLLLL"], "num_layers: got 4, expected a multiple of 'LLLLL'"),
        (["--context-length", "1000000"], "context_length: got 1000000, expected 1 to"),
        (["--divergence", "0", "--cross-entropy", "0"], "divergence: got 0.0, expected more than 0 where"),
    ],
)
def test_what_cannot_be_is_refused(llama, prefix, tmp_path, more, message):
    with pytest.raises((ValueError, SystemExit), match=message if "--divergence" not in more else None):
        cli.main(["import", llama, str(tmp_path / "linear"), *options(prefix, *more)])


def test_what_else_lies_there_is_not_touched(llama, prefix, tmp_path):
    for name, file, told in (
        ("run", "checkpoints/latest", "step-00000001"),
        ("another", "begun.json", json.dumps({"source": "/models/another"})),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text(told)
    (tmp_path / "run/checkpoints/step-00000001").mkdir()
    for name, message in (("run", "this one holds a run"), ("another", "this one has begun with .*/models/another")):
        with pytest.raises(ValueError, match=f"output: got .*{name}.*, expected a new directory; {message}"):
            cli.main(["import", llama, str(tmp_path / name), *options(prefix)])
        assert not (tmp_path / name / "start").exists()


def test_settings_of_a_distillation_want_one():
    with pytest.raises(ValueError, match="divergence: got 0.0, expected more than 0 where cross_entropy is 0"):
        Distillation(divergence=0.0, cross_entropy=0.0)
    with pytest.raises(ValueError, match="distill: got None, expected the token files for the settings"):
        cli.main(["import", "llama", "linear", "--rank", "4"])


def test_a_teacher_has_no_linear_layers(prefix, tmp_path):
    to_huggingface(Decoder(replace(SHAPE, window=None, feature_map=None))).save_pretrained(tmp_path / "hybrid")
    with pytest.raises(ValueError, match="pattern: got 'LN', expected only N"):
        cli.main(["import", str(tmp_path / "hybrid"), str(tmp_path / "linear"), *options(prefix)])
