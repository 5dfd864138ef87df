"""Runs side by side as a picture: loss, tokens a second, memory and the gradient's norm over the steps."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from lasp.config import require
from lasp.pictures import empty_figure
from lasp.training.metrics import read_metrics

PANELS = {
    "loss": "loss (nats per token)",
    "tokens_per_second": "tokens/s",
    "memory": "memory at its peak (GiB)",
    "grad_norm": "gradient norm",
}


def plot(run_dirs: Sequence[str], output: str | None = None) -> Path:
    """Writes a PNG, in the first run's directory if nowhere else is named, and returns its path.

    Raises FileNotFoundError for a directory without metrics, ValueError for none, or for runs of which one has no step.
    """
    require(bool(run_dirs), "run_dirs", run_dirs, "at least one run's directory")
    figure = empty_figure(11, 7)
    axes = dict(zip(PANELS, figure.subplots(2, 2).flat, strict=True))
    for run_dir in run_dirs:
        records = read_metrics(run_dir)
        require(any("loss" in record for record in records), "run_dirs", run_dir, "a run that has taken a step")
        for name, panel in axes.items():
            line = panel.plot(*_curve(records, name), linewidth=0.8, label=Path(run_dir).resolve().name)[0]
            if name == "loss":
                for marker, held_out in zip(cycle(".xs^v*+D"), _held_out(records), strict=False):
                    corpus = held_out.partition("/")[2] or None
                    curve = _curve(records, held_out)
                    panel.plot(*curve, marker=marker, linestyle="--", color=line.get_color(), label=corpus)
    for name, panel in axes.items():
        panel.set(xlabel="step", ylabel=PANELS[name])
        panel.grid(alpha=0.3)
    axes["loss"].set_title("training, and held out (dashed)", fontsize="medium")
    axes["grad_norm"].set_yscale("log")
    axes["loss"].legend()
    picture = Path(output or Path(run_dirs[0]) / "plot.png")
    figure.savefig(picture, dpi=150)
    return picture


def _held_out(records: list[dict[str, Any]]) -> list[str]:
    """What evaluations logged: the mean loss, and those of the corpora if there are several."""
    return sorted({name for record in records for name in record if name.partition("/")[0] == "valid_loss"})


def _curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if name in record]
    return [record["step"] for record in known], [record[name] for record in known]
