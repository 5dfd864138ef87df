"""A sweep from its data to its table: what is trained, what counts, and that a stopped one goes on."""

import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from lasp import cli
from lasp.config import ModelConfig
from lasp.data import PackedContexts
from lasp.evaluation.recall import graphed
from lasp.evaluation.recall import sweep as module
from lasp.evaluation.recall.at_once import train_at_once
from lasp.evaluation.recall.config import SWEEPS, RecallSweep, parse_model
from lasp.evaluation.recall.job import Job
from lasp.evaluation.recall.measure import state_size
from lasp.evaluation.recall.report import Cell, SweepResult
from lasp.evaluation.recall.sweep import run
from lasp.evaluation.remembered import remembered
from lasp.evaluation.subject import open_subject, read_model
from lasp.evaluation.tasks import MQAR
from lasp.models import Decoder
from lasp.training.metrics import read_metrics
from lasp.training.runtime import join_world
from lasp.training.starts import last_config
from tests.patience import PATIENCE


@pytest.fixture
def small(tmp_path):
    sweep = SWEEPS["mqar_small"]()
    return replace(
        sweep,
        run_dir=str(tmp_path / "sweep"),
        models=("softmax", "linear:LN"),
        task=MQAR(vocab_size=32, length=16, pairs=(2, 3)),
        sequences=40,
        held_out=16,
        epochs=1,
        batch=8,
        widths=(8,),
        init_std=8**-0.5,
        workers=1,
        learning_rates=(1e-2, 3e-3),
        parallel=replace(sweep.parallel, timeout=PATIENCE),
    )


def test_a_sweep_trains_and_reports_every_cell(small, capsys):
    found = run(small)
    names = [(cell.model, cell.width, cell.lr, cell.seed) for cell in found.cells]
    assert names == [(model, 8, lr, 0) for model in small.models for lr in (1e-2, 3e-3)]
    assert all(set(cell.accuracy) == {"2", "3"} for cell in found.cells)
    record = json.loads(Path(small.run_dir, "mqar.json").read_text())
    assert [row["model"] for row in record["table"]] == ["softmax", "linear:LN"]
    assert len(record["runs"]) == 4
    table = Path(small.run_dir, "mqar.txt").read_text()
    assert " ".join(table.splitlines()[0].split()) == "model width state best lr mean ± se 2 pairs 3 pairs"
    assert Path(small.run_dir, "mqar.png").read_bytes().startswith(b"\x89PNG")
    assert table in capsys.readouterr().out


def test_accuracy_is_that_of_the_likeliest_tokens(small):
    small = replace(small, models=("linear:LN",), learning_rates=(1e-2,))
    (cell,) = run(small).cells
    config = small.run("linear:LN", 8, 1e-2, 0)
    assert config.steps == 10
    for pairs in (2, 3):
        with join_world(config) as world:
            subject = open_subject(config.run_dir, world, config.parallel)
            model, seq = subject.model, subject.sp.sequence(16)
            contexts = PackedContexts(small.held_out_data(pairs), 16, seed=0, shuffle=False)
            right = []
            for context in contexts.one_epoch():
                labels = context.labels(0, 16)
                best = model(context.tokens(0, 16)[None], seq)[0].argmax(-1)
                right += (best == labels)[labels >= 0].tolist()
        assert len(right) == 16 * pairs
        assert cell.accuracy[str(pairs)] == pytest.approx(sum(right) / len(right), abs=1e-12)


def test_a_stopped_sweep_goes_on(small, monkeypatch):
    trained = []

    def train(config):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(config.run_dir)
        return real(config)

    real = module.train
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "train", train)
        run(small)
    before = {path: path.stat().st_mtime_ns for path in Path(small.run_dir).rglob("checkpoints/step*")}
    assert len(before) == 2
    assert len(run(small).cells) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_cells_may_be_trained_in_processes(small, monkeypatch):
    """Which are threads here, one at a time, since processes take long to start; what goes to them can be sent."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, mp_context):
            assert workers == 2
            assert mp_context.get_start_method() == "spawn"
            super().__init__(1)

        def submit(self, function, job):
            sent = pickle.loads(pickle.dumps((function, job)))
            return super().submit(lambda: pickle.loads(pickle.dumps(sent[0](sent[1]))))

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    small = replace(small, models=("softmax",), learning_rates=(1e-2,), seeds=(0, 1), workers=2)
    apart = run(small)
    assert apart == run(replace(small, run_dir=f"{small.run_dir}-2", workers=1))
    assert "finished 10 of 10 steps" in Path(small.run("softmax", 8, 1e-2, 1).run_dir, "log.txt").read_text()


def test_what_an_earlier_version_found_is_not_sought_again(small):
    config = small.run("softmax", 8, 1e-2, 0)
    Path(config.run_dir).mkdir(parents=True)

    def not_again():
        raise AssertionError("sought again")

    with join_world(config):
        assert remembered(config, "found.json", lambda: {"loss": 1.5}) == {"loss": 1.5}
        file = Path(config.run_dir, "found.json")
        kept = json.loads(file.read_text())
        del kept["config"]["model"]["num_householder"]
        file.write_text(json.dumps(kept))
        assert remembered(config, "found.json", not_again) == {"loss": 1.5}
        other = replace(config, model=replace(config.model, num_householder=3))
        assert remembered(other, "found.json", lambda: {"loss": 2.5}) == {"loss": 2.5}


def test_a_run_that_diverges_does_not_end_the_sweep(small, monkeypatch, capsys):
    def train(config):
        if config.optimizer.lr == 1e-2:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
            raise FloatingPointError("step 3, loss: got nan, expected a finite number")
        return real(config)

    real = module.train
    monkeypatch.setattr(module, "train", train)
    small = replace(small, models=("linear:LN",))
    found = run(small)
    assert [cell.loss is None for cell in found.cells] == [True, False]
    assert found.cells[0].mean == 0
    assert "learning rate 0.01, seed 0: 0.0 % right (its loss was not finite)" in capsys.readouterr().out
    assert run(small) == found
    json.loads(Path(small.run_dir, "mqar.json").read_text(), parse_constant=pytest.fail)


def at_once(sweep):
    """The cells, as one GPU finds them."""
    cells = product(sweep.models, sweep.widths, sweep.learning_rates, sweep.seeds)
    jobs = [Job(sweep, *cell) for cell in cells]
    with join_world(jobs[0].config) as world:
        module.write_data(sweep)
        found = dict(train_at_once(jobs, world))
    return [found[job] for job in jobs]


@pytest.mark.parametrize("models", [("softmax",), ("gated_delta_net", "mamba2")])
def test_runs_whose_data_lie_on_the_device_are_the_same_runs(small, models, monkeypatch):
    """A GPU makes a graph of each of their steps, which the host never looks into."""
    monkeypatch.setattr(graphed, "STRETCH", 3)
    monkeypatch.setattr(graphed, "AHEAD", 2)
    small = replace(small, models=models, learning_rates=(1e-2,), seeds=(0, 1), epochs=2)
    one_by_one = run(small)
    other = replace(small, run_dir=f"{small.run_dir}-2", workers=3)
    cells = at_once(other)
    assert at_once(other) == cells  # which they are remembered for
    for cell, wanted in zip(cells, one_by_one.cells, strict=True):
        assert cell.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert replace(cell, loss=wanted.loss) == wanted
    config, before = (sweep.run(models[0], 8, 1e-2, 0) for sweep in (other, small))
    losses, wanted = (
        [record["loss"] for record in read_metrics(folder) if "loss" in record]
        for folder in (config.run_dir, before.run_dir)
    )
    assert len(losses) == config.steps == 20
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert math.isfinite(module.train(config))  # nothing is left to do
    assert last_config(config.run_dir).steps == 20
    assert len(list(Path(config.run_dir, "checkpoints").glob("step-*"))) == 1


def test_a_device_may_compute_in_bfloat16(small):
    """Its weights and the optimiser's states are float32 still."""
    small = replace(small, models=("gla",), learning_rates=(1e-2,), dtype="bfloat16")
    (wanted,), other = run(small).cells, replace(small, run_dir=f"{small.run_dir}-2")
    (cell,) = at_once(other)
    assert cell.loss == pytest.approx(wanted.loss, rel=1e-3)
    assert read_model(other.run("gla", 8, 1e-2, 0).run_dir).decoder.embedding.weight.dtype == torch.float32


def test_a_gpu_has_only_so_many_streams(small):
    with pytest.raises(ValueError, match="workers: got 33, expected at most 32 on one GPU"):
        at_once(replace(small, workers=33))


def test_a_run_that_diverges_on_a_device_is_a_cell(small, monkeypatch):
    def diverge(run):
        raise FloatingPointError("loss of the last step: got nan")

    monkeypatch.setattr(graphed.GraphedRun, "finish", diverge)
    (cell,) = at_once(replace(small, models=("gla",), learning_rates=(1e-2,)))
    assert cell.loss is None
    assert not list(Path(small.run_dir).rglob("lock"))


def test_the_best_learning_rate_is_that_of_the_mean_over_seeds():
    def cell(lr, seed, *accuracy):
        by_pairs = dict(zip(("4", "8"), accuracy, strict=True))
        kept = {"model": "gla", "width": 64, "parameters": 1, "state": 2, "loss": 0.0}
        return Cell(lr=lr, seed=seed, accuracy=by_pairs, **kept)

    result = SweepResult(
        [cell(0.1, 0, 1.0, 1.0), cell(0.1, 1, 0.0, 0.0), cell(0.2, 0, 0.9, 0.5), cell(0.2, 1, 0.9, 0.7)]
    )
    (row,) = result.rows()
    assert {c.lr for c in row.cells} == {0.2}
    assert row.accuracy() == pytest.approx((0.75, 0.05))
    assert row.accuracy("8") == pytest.approx((0.6, 0.1))
    assert "75.0 ± 5.0" in result.table()


@pytest.mark.parametrize(("pattern", "per_layer"), [("L", 4 * 6), ("N", 5 * (4 + 4))])
def test_the_state_is_what_a_layer_has_to_keep(pattern, per_layer):
    config = ModelConfig(
        vocab_size=8,
        hidden_size=4,
        num_layers=2,
        num_heads=1,
        intermediate_size=4,
        mixer="linear",
        pattern=pattern,
        value_head_dim=6 if pattern == "L" else None,
    )
    with torch.device("cpu"):
        assert state_size(Decoder(config), 5) == 2 * per_layer


def test_names_of_models():
    assert parse_model("gla") == ("gla", "L", False)
    assert parse_model("gla:LN") == ("gla", "LN", False)
    assert parse_model("gla+conv:LN") == ("gla", "LN", True)
    assert parse_model("softmax").pattern == "N"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, r"models: got \(\), expected at least one"),
        ({"models": ("lstm",)}, "models: got 'lstm', expected softmax, one of linear"),
        ({"models": ("gla:",)}, "models: got 'gla:'"),
        ({"models": ("kda+conv",)}, r"models: got 'kda\+conv', expected .*\(\+conv behind linear, .* hgrn2"),
        ({"models": ("softmax:L",)}, "models: got 'softmax:L'"),
        ({"models": ("gla:LLN",)}, "layers: got 2, expected a multiple of gla:LLN's pattern's length"),
        ({"seeds": (1, 1)}, r"seeds: got \(1, 1\), expected each once"),
        ({"batch": 10**6}, "batch: got 1000000, expected at most the"),
        ({"held_out": 1, "batch": 64}, "held_out: got 1, expected a batch of 64 sequences"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SWEEPS["mqar_small"](), **settings)


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_runs_by_its_name(monkeypatch, name):
    asked = []
    monkeypatch.setattr(module, "run", asked.append)
    cli.main(["train", name.replace("_", "-"), "--models", "gla:LN", "--task.pairs", "4"])
    expected = SWEEPS[name]()
    assert asked == [replace(expected, models=("gla:LN",), task=replace(expected.task, pairs=(4,)))]
    assert isinstance(asked[0], RecallSweep)
