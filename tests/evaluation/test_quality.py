"""Recall in texts against a search for pairs, and the quality table from a folder of sources to its picture."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lasp import cli
from lasp.config import ParallelConfig
from lasp.data import IGNORED, PackedContexts, TokenFile, TokenFileWriter, load_tokenizer
from lasp.evaluation.quality import run as module
from lasp.evaluation.quality.config import SIZES, TABLES, QualityTable
from lasp.evaluation.quality.report import Cell, QualityResult
from lasp.evaluation.repeats import RecallInText, distance_edges, distances
from lasp.parallel import SequenceParallel
from tests.patience import PATIENCE


@torch.no_grad()
def test_recall_in_text(subject, run):
    result = RecallInText(model=run.run_dir, context_length=200).run(subject)
    edges, found = distance_edges(200), {}
    for context in PackedContexts(run.data.valid, 200, seed=0, shuffle=False).one_epoch():
        for start, stop in pairwise(context.cu_seqlens.tolist()):
            tokens, labels = context.tokens(start, stop), context.labels(start, stop)
            logits = subject.model(tokens[None], SequenceParallel(None).sequence(len(tokens)))[0]
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").tolist()
            right, pairs, last = (logits.argmax(-1) == labels).tolist(), [], {}
            for place, pair in enumerate(zip(tokens.tolist(), labels.tolist(), strict=True)):
                pairs.append(place - last[pair] if pair in last else 0)
                last[pair] = place
            for place, back in enumerate(pairs):
                if labels[place] != IGNORED:
                    first = max(edge for edge in edges if edge <= back)
                    found.setdefault(first, []).append((losses[place], right[place]))
    assert [one.first for one in result.distances] == sorted(found)
    for one in result.distances:
        inside = found[one.first]
        assert one.labels == len(inside)
        assert one.loss == pytest.approx(sum(loss for loss, _ in inside) / len(inside), rel=1e-10)
        assert one.accuracy == pytest.approx(sum(right for _, right in inside) / len(inside), abs=1e-12)
    assert "or more tokens back" in result.table()


def test_recall_of_rows_and_of_masked_labels(tmp_path, gen):
    with TokenFileWriter(tmp_path / "data", "uint16", masked=True) as writer:
        for _ in range(3):
            writer.add_document(torch.tensor([5, 6, 7, 5, 6, 5, 6, 7]).numpy(), torch.tensor([1, 0] * 4).numpy())
    (context,) = PackedContexts(tmp_path / "data", 24, seed=0, shuffle=False).one_epoch()
    assert context.row_length == 8
    assert distances(context).reshape(3, 8)[:, :7].tolist() == [[0, 0, 0, 3, 0, 2, 5]] * 3


@pytest.fixture
def small(tmp_path):
    """Two models on four folders of sources."""
    for number in range(4):
        folder = tmp_path / "sources" / str(number)
        folder.mkdir(parents=True)
        for name in ("a.c", "b.h", "c.o"):
            (folder / name).write_text(f"int {name[0]}{number}(void) {{ return {number}; }}\n" * (20 + number))
    return QualityTable(
        run_dir=str(tmp_path / "table"),
        corpus=(str(tmp_path / "sources"),),
        vocab_size=270,
        models=("softmax", "linear:LN"),
        sizes=("mini",),
        contexts=(128,),
        tokens=512,
        step_tokens=256,
        held_out=4,
        dtype="float32",
        device="cpu",
        parallel=ParallelConfig(sequence_parallel=None, fsdp=False, timeout=PATIENCE),
    )


def test_from_sources_to_a_table(small, capsys, monkeypatch):
    found = module.run(replace(small, workers=2))
    assert [cell.model for cell in found.cells] == ["softmax", "linear:LN"]
    assert "step 2" in Path(small.run("softmax", "mini", 128, 0).run_dir, "log.txt").read_text()
    data, tokenizer = TokenFile(f"{small.data}_train"), load_tokenizer(small.tokenizer)
    assert (data.num_documents, tokenizer.vocab_size) == (3, 270)
    text = tokenizer.decode(data.tokens[: data.document_starts[1]])
    assert text.startswith("==> a.c <==\nint a")
    assert "\n==> b.h <==\nint b" in text
    assert ".o" not in text
    record = json.loads(Path(small.run_dir, "quality.json").read_text())
    assert [row["model"] for row in record["table"]] == ["softmax", "linear:LN"]
    assert record["table"][0]["loss"] == found.cells[0].loss
    assert Path(small.run_dir, "quality.txt").read_text() in capsys.readouterr().out
    assert Path(small.run_dir, "quality.png").read_bytes().startswith(b"\x89PNG")

    # The same command again trains and evaluates nothing, and another model only that.
    real, trained = module.train, []
    monkeypatch.setattr(module, "train", lambda config: trained.append(config.run_dir) or real(config))
    assert module.run(small) == found
    assert not trained
    assert module.run(replace(small, models=("softmax", "linear:NL"))).cells[0] == found.cells[0]
    assert trained == [small.run("linear:NL", "mini", 128, 0).run_dir]
    with pytest.raises(ValueError, match="corpus: got .*expected .*another run_dir"):
        module.run(replace(small, vocab_size=271))


@pytest.mark.parametrize(
    ("size", "device", "expected"), [(2, "cpu", "1 on 2 ranks"), (1, "cuda", "at most 1, one for each GPU")]
)
def test_workers_have_neither_ranks_nor_a_gpu_together(small, monkeypatch, size, device, expected):
    world = SimpleNamespace(rank=0, size=size, device=torch.device(device))
    monkeypatch.setattr(module, "join_world", lambda config: nullcontext(world))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=f"workers: got 2, expected {expected}"):
        module.run(replace(small, workers=2))


def test_what_a_table_shows():
    def cell(seed, loss):
        positions = [{"first": first, "labels": 2, "loss": loss + first} for first in (0, 1, 8, 64)]
        distances = [{"first": first, "labels": first + 1, "accuracy": 1 / (1 + first)} for first in (0, 1, 16, 64)]
        about = {"model": "gla", "size": "mini", "context": 256, "parameters": 1000}
        return Cell(seed=seed, loss=loss, positions=positions, distances=distances, **about)

    result = QualityResult([cell(0, 1.0), cell(1, 2.0)])
    head, row = result.table().splitlines()
    assert " ".join(head.split()) == (
        "mini, 256 tokens parameters loss 0 on 16 on 64 on recall 4 on recall 16 on recall 64 on"
    )
    assert row.split() == ["gla", "1,000", "1.5000", "±", "0.5000", "4.5000", "nan", "65.5000", "2.4", "2.4", "1.5"]
    (about,) = result.record()["table"]
    assert about["loss_by_part"] == {"0-16": 4.5, "16-64": None, "64-256": 65.5}
    assert about["recall"]["64"] == pytest.approx(1 / 65)
    assert math.isnan(result.cells[0].recall(65))
    drawn = result.cells[0].loss_by_doubling()
    assert (drawn[64], list(drawn)) == (65.0, [64, 128])


@pytest.mark.parametrize("name", TABLES)
def test_every_table_runs_by_its_name(monkeypatch, name):
    asked = []
    monkeypatch.setattr(module, "run", asked.append)
    cli.main(["train", name.replace("_", "-"), "--models", "gla:LN", "--contexts", "1024", "2048"])
    assert asked == [replace(TABLES[name](), models=("gla:LN",), contexts=(1024, 2048))]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_about_what_they_say(size):
    from lasp.models import count_parameters

    parameters = count_parameters(TABLES["quality"]().run("softmax", size, 16_384, 0).model)
    assert size == "mini" or parameters == pytest.approx(int(size[:-1]) * 1e6, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, r"models: got \(\), expected at least one"),
        ({"models": ("lstm",)}, "models: got 'lstm', expected softmax"),
        ({"models": ("gla:LLN",)}, "models: got 'gla:LLN', expected a pattern that divides the 8 layers of mini"),
        ({"seeds": (1, 1)}, r"seeds: got \(1, 1\), expected each once"),
        ({"contexts": (1000,)}, "contexts: got 1000, expected a divisor of step_tokens=4096"),
        ({"tokens": 100}, "step_tokens: got 4096, expected at most tokens=100"),
    ],
)
def test_tables_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(TABLES["quality_small"](), **settings)
