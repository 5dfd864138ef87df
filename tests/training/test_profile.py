"""A profile has the phases and layers of some steps, memory is told by part, and runs are drawn side by side."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lasp import cli
from lasp.models import count_parameters
from lasp.training import profile
from lasp.training.metrics import read_metrics
from lasp.training.train import train


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_profile_has_phases_and_layers(config, monkeypatch, recompute):
    monkeypatch.setattr(profile, "STEPS", 1)
    config = replace(config, steps=3, context_length=32, profile=True, recompute=recompute, eval_every=9)
    plain = train(replace(config, profile=False, run_dir=f"{config.run_dir}_plain"))
    assert train(config) == plain
    folder = Path(config.run_dir) / "profile"
    table = (folder / "rank-0.txt").read_text()
    calls = {name: int(n) for name, n in re.findall(r"^(\w[\w ]*?) +[\d.]+ +[\d.]+ +(\d+)$", table, re.MULTILINE)}
    assert [calls[phase] for phase in ("read", "forward", "backward", "optimizer")] == [1, 2, 2, 1]  # of two contexts
    assert list(calls)[:4] == ["read", "forward", "backward", "optimizer"]
    again = 2 if recompute == "full" else 1
    for layer in range(config.model.num_layers):
        assert (calls[f"layer {layer} forward"], calls[f"layer {layer} backward"]) == (2 * again, 2)
    trace = json.loads((folder / "rank-0.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    (inside, *_) = [event for event in events if event["name"] == "layer 1 backward"]
    around = [event for event in events if event["name"] == "backward"]
    assert any(e["ts"] <= inside["ts"] and inside["ts"] + inside["dur"] <= e["ts"] + e["dur"] for e in around)


def test_memory_is_told_by_part(config, capsys):
    train(replace(config, steps=2))
    records = read_metrics(config.run_dir)
    (parts,) = [record["memory_by_part"] for record in records if "memory_by_part" in record]
    bytes_of_weights = 8 * count_parameters(config.model)
    assert parts["weights"] == parts["gradients"] == bytes_of_weights
    assert 2 * bytes_of_weights <= parts["optimizer"] < 2.1 * bytes_of_weights
    assert parts["rest"] > 0
    assert "memory of rank 0 at its peak, GiB: weights 0.00, gradients 0.00" in capsys.readouterr().out
    assert all(record["memory"] > 0 for record in records if "loss" in record)


def test_runs_are_drawn_side_by_side(config, tmp_path, capsys):
    for name in ("a", "b"):
        train(replace(config, steps=2, run_dir=str(tmp_path / name)))
    cli.main(["plot", str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.endswith(f"{tmp_path}/a/plot.png\n")
    cli.main(["plot", str(tmp_path / "b"), "--output", str(tmp_path / "own.png")])
    for picture in (tmp_path / "a/plot.png", tmp_path / "own.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a/metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="run_dirs: got .*/a', expected a run that has taken a step"):
        cli.main(["plot", str(tmp_path / "b"), str(tmp_path / "a")])
