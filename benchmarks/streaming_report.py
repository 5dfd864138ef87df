"""Draws the peaks of memory that benchmarks/streaming.py measured against the context, over what the plan expects.

    python benchmarks/streaming_report.py docs/streaming.csv docs/streaming.png

A line of the file is a step; its columns are named as the fields of a setting of `lasp.plan`.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from lasp.models import PRESETS
from lasp.pictures import empty_figure
from lasp.plan import GPUS, Job, Plan, Setting, plan
from lasp.plan.gpus import GIB


@dataclass(frozen=True)
class Step:
    """A measured step, and the plan for it."""

    model: str
    plan: Plan
    seconds: float
    peak_gib: float

    @property
    def series(self) -> str:
        job, setting = self.plan.job, self.plan.setting
        pattern = "" if set(job.model.pattern) == {"L"} else f" {job.model.pattern}"
        offloaded = " offloaded" * setting.offload_activations
        gpus = f"{job.gpus} GPU{'s' * (job.gpus > 1)}"
        how = [f"{self.model}{pattern}", gpus, f"recompute {setting.recompute}{offloaded}"]
        if setting.segment_tokens is not None:
            how.append(f"segments of {setting.segment_tokens:,}")
        if setting.segment_graphs > 1:
            how.append("several computed once")
        return ", ".join(how)


def read(file: Path) -> list[Step]:
    """Steps of models with Gated DeltaNet on H200s."""

    def number(cell: str) -> int | None:
        return int(cell) if cell else None

    found = []
    for row in csv.DictReader(file.open()):
        job = Job(
            model=PRESETS[row["model"]]("gated_delta_net", row["pattern"]),
            context=int(row["tokens"]),
            gpu=GPUS["H200"],
            gpus=int(row["gpus"]),
        )
        setting = Setting(
            sequence_parallel=job.gpus,
            segment_tokens=number(row["segment_tokens"]),
            segment_graphs=int(row["segment_graphs"]),
            recompute=row["recompute"],  # type: ignore[arg-type]
            recompute_layers=number(row["recompute_layers"]),
            offload_activations=bool(row["offload_activations"]),
        )
        found.append(Step(row["model"], plan(job, setting), float(row["seconds"]), float(row["peak_gib"])))
    return found


def main(file: tyro.conf.Positional[Path], picture: tyro.conf.Positional[Path]) -> None:
    series: dict[str, list[Step]] = defaultdict(list)
    for step in read(file):
        series[step.series].append(step)
    figure = empty_figure(9, 5)
    axes = figure.add_subplot(xlabel="tokens of a context", ylabel="GiB on each GPU", xscale="log", ylim=(0, 150))
    for name, steps in series.items():
        contexts = [step.plan.job.context for step in steps]
        (points,) = axes.plot(contexts, [step.peak_gib for step in steps], marker="o", linestyle="", label=name)
        job, setting = steps[0].plan.job, steps[0].plan.setting
        if setting.segment_graphs == 1:
            lengths = [contexts[0] * 2**i for i in range(-1, 9) if contexts[0] * 2**i <= 2**24]
            expected = [plan(replace(job, context=n), setting).memory.total / GIB for n in lengths]
            axes.plot(lengths, expected, color=points.get_color(), linewidth=0.8)
    axes.axhline(GPUS["H200"].usable / GIB, color="black", linestyle="--", linewidth=1, label="an H200 has")
    axes.legend(fontsize="x-small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
