import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from lasp.training import metrics
from lasp.training.metrics import Metrics, model_flop_utilisation, peak_flops, read_metrics
from lasp.training.train import train


def open_metrics(path, first_step=0, rank=0):
    return Metrics(path, first_step=first_step, steps=10, rank=rank)


def test_records_come_back_in_order(tmp_path):
    with open_metrics(tmp_path) as run:
        run.log(1, loss=2.5, tokens_per_second=10.0)
        run.log(1, valid_loss=2.0)
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.5, "tokens_per_second": 10.0},
        {"step": 1, "valid_loss": 2.0},
    ]


def test_records_are_on_disk_before_the_run_ends(tmp_path):
    with open_metrics(tmp_path) as run:
        run.log(1, valid_loss=2.0)
        assert read_metrics(tmp_path) == [{"step": 1, "valid_loss": 2.0}]


def test_resuming_forgets_the_steps_that_are_taken_again(tmp_path):
    with open_metrics(tmp_path) as run:
        for step in range(1, 6):
            run.log(step, valid_loss=float(step))
    with open_metrics(tmp_path, first_step=3) as run:
        run.log(4, valid_loss=40.0)
    assert [r["valid_loss"] for r in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]


def test_resuming_only_appends(tmp_path):
    """So neither a kill nor a full disk costs what was there."""
    file = tmp_path / metrics.METRICS_FILE
    file.write_text('{"step": 1, "valid_loss": 1.0}\n{"step": 2, "valid_loss": 2.0}\nnot a record\n')
    before = file.read_bytes()
    for step in (1, 2):
        with open_metrics(tmp_path, first_step=1) as run:
            assert file.read_bytes().startswith(before)
            run.log(2, valid_loss=20.0 * step)
        before = file.read_bytes()
    with pytest.warns(UserWarning, match="unreadable"):
        assert [r["valid_loss"] for r in read_metrics(tmp_path)] == [1.0, 40.0]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    with open_metrics(tmp_path) as run:
        run.log(1, valid_loss=2.0)

    def full(record):
        raise OSError("No space left on device")

    monkeypatch.setattr(metrics.json, "dumps", full)
    with pytest.raises(OSError, match="No space"):
        open_metrics(tmp_path, first_step=1)
    assert read_metrics(tmp_path) == [{"step": 1, "valid_loss": 2.0}]


@pytest.mark.parametrize(
    "line", [b'\0\0\0{"step": 9', b"\xff\xfe", b"[1, 2]", b"7", b'{"loss": 1.0}', b'{"step": null}', b'{"step": 2, "lo']
)
def test_unreadable_lines_are_left_out_with_one_warning(tmp_path, line):
    file = tmp_path / metrics.METRICS_FILE
    file.write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b"\n" + line + b"\n")
    with open_metrics(tmp_path, first_step=1) as run:
        run.log(2, valid_loss=2.0)
    with pytest.warns(UserWarning) as seen:
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "valid_loss": 2.0}]
    assert [str(warning.message) for warning in seen] == [f"{file}: left out 2 unreadable lines, first line 2"]


@pytest.mark.filterwarnings("ignore:.*unreadable")
def test_a_line_that_a_crash_cut_short_is_forgotten(tmp_path):
    (tmp_path / metrics.METRICS_FILE).write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    with open_metrics(tmp_path, first_step=1) as run:
        run.log(2, valid_loss=2.0)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "valid_loss": 2.0}]


def test_other_ranks_are_silent(tmp_path, capsys):
    with open_metrics(tmp_path / "run", rank=1) as run:
        run.log(1, loss=1.0, tokens_per_second=1.0)
        run.say("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_utilisation_is_of_all_devices():
    assert model_flop_utilisation(2e9, 1e6, devices=4, peak=1e15) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Unknown", None)],
)
def test_only_known_gpus_have_a_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bfloat16") == peak
    assert peak_flops(torch.device("cuda", 0), "float32") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    with Metrics(tmp_path, first_step=0, steps=7, rank=0, log_every=3) as run:
        for step in range(1, 8):
            run.log(step, loss=2.5, tokens_per_second=1234.0, grad_norm=0.125, lr=1e-3, memory=1.5)
        run.say("long " * 30 + "line")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "step 3/7",
        "step 6/7",
        "step 7/7",
        "long " * 30 + "line",
    ]
    assert lines[0] == "step 3/7: loss 2.5000, 1,234 tokens/s, gradient norm 0.125, lr 0.001, 1.50 GiB"


@pytest.fixture
def wandb(monkeypatch):
    """Weights & Biases that keeps what it is told."""

    class Run:
        def __init__(self, **settings):
            self.settings, self.logged, self.code = settings, [], None

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            self.logged.append(values)

        def finish(self, exit_code):
            self.code = exit_code

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.runs = []
    module.init = lambda **settings: module.runs.append(Run(**settings)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_the_metrics(tmp_path, wandb):
    options = {"steps": 3, "wandb": "project", "settings": {"seed": 1}}
    with Metrics(tmp_path / "run", first_step=0, rank=0, **options) as run:
        run.log(1, valid_loss=2.0)
    with pytest.raises(RuntimeError), Metrics(tmp_path / "run", first_step=1, rank=0, **options) as run:
        run.log(2, valid_loss=1.0)
        raise RuntimeError
    with Metrics(tmp_path / "run", first_step=0, rank=1, **options):
        pass
    first, second = wandb.runs
    assert first.logged + second.logged == [{"step": 1, "valid_loss": 2.0}, {"step": 2, "valid_loss": 1.0}]
    assert (first.code, second.code) == (0, 1)
    assert first.settings == second.settings  # the same run, which goes on
    assert (first.settings["project"], first.settings["name"]) == ("project", "run")


def test_weights_and_biases_have_to_be_there(monkeypatch, config):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb: got 'project', expected it installed .*lasp-sp\[wandb\]"):
        train(replace(config, wandb="project"))
