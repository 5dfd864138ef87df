"""What a run reports while it trains, all from rank 0: a progress bar, or lines where there is no terminal,
metrics.jsonl, TensorBoard events, and Weights & Biases if asked for.

metrics.jsonl is only ever appended to: a run that goes on from step s writes {"resumed_from": s}, and records of later
steps that stand before it no longer count.
"""

import json
import os
import secrets
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from lasp.config import require
from lasp.plan.gpus import of_name

METRICS_FILE = "metrics.jsonl"
RESUMED = "resumed_from"


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for any other device or dtype, whose utilisation is then not reported."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    gpu = of_name(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops


def model_flop_utilisation(flops_per_token: float, tokens_per_second: float, devices: int, peak: float) -> float:
    """MFU = FLOP per token x tokens/s / (devices x peak FLOP/s), with tokens/s counted over all the devices.

    FLOP per token are those of the model's mathematics, forward and backward; what is recomputed does not count.
    """
    return flops_per_token * tokens_per_second / (devices * peak)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, in order, without those of steps that were taken again after a stop.

    Warns of lines that are not records, and leaves them out. Raises FileNotFoundError if the run left none.
    """
    path = Path(run_dir) / METRICS_FILE
    records: list[dict[str, Any]] = []
    unreadable = []
    with open(path, errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break  # being written, or cut short by a crash
            record = _parse(line)
            if record is None:
                unreadable.append(number)
            elif RESUMED in record:
                records = [r for r in records if r["step"] <= record[RESUMED]]
            else:
                records.append(record)
    if unreadable:
        warnings.warn(f"{path}: left out {len(unreadable)} unreadable lines, first line {unreadable[0]}", stacklevel=2)
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get(RESUMED, record.get("step")) if isinstance(record, dict) else None
    return record if isinstance(step, int) else None


class Metrics:
    """A run's reports; a context manager. On every rank but 0 it stays silent."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        first_step: int,
        steps: int,
        rank: int,
        log_every: int = 10,
        wandb: str | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """log_every: steps between lines, without a terminal. wandb: a project, whose run gets the settings."""
        self.silent, self.steps, self.log_every = rank != 0, steps, log_every
        if self.silent:
            return
        path = Path(run_dir)
        path.mkdir(parents=True, exist_ok=True)
        self.file = open(path / METRICS_FILE, "ab+")  # noqa: SIM115 (closed by __exit__)
        if self.file.tell() > 0:
            self.file.seek(-1, os.SEEK_END)
            cut_short = self.file.read() != b"\n"
            self._append({RESUMED: first_step}, before="\n" if cut_short else "")
        self.tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=first_step + 1)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns)
        self.bar = self.progress.add_task("training", total=steps, completed=first_step, loss=float("nan"), rate=0.0)
        if self.progress.console.is_terminal:
            self.progress.start()
        self.wandb = None if wandb is None else _open_wandb(wandb, path, settings)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.silent:
            if self.progress.live.is_started:
                self.progress.stop()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=0 if kind is None else 1)
            self.file.close()

    def log(self, step: int, **values: float) -> None:
        """Records named values of a step (of training if there is a `loss` among them, else of an evaluation)."""
        if self.silent:
            return
        self._append({"step": step, **values})
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log({"step": step, **values})
        if "loss" in values:
            self.progress.update(self.bar, completed=step, loss=values["loss"], rate=values["tokens_per_second"])
            if not self.progress.console.is_terminal and (step % self.log_every == 0 or step == self.steps):
                self.say(_line(step, self.steps, values))

    def note(self, step: int, **facts: object) -> None:
        """Records facts about a step that are no curves."""
        if not self.silent:
            self._append({"step": step, **facts})

    def _append(self, record: dict[str, Any], before: str = "") -> None:
        self.file.write(f"{before}{json.dumps(record)}\n".encode())
        self.file.flush()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self.silent:
            self.progress.console.print(text, soft_wrap=True)


def require_wandb(project: str | None) -> None:
    """Raises ValueError if it is wanted and not installed."""
    there = project is None or find_spec("wandb") is not None
    require(there, "wandb", project, "it installed (lasp's extra: pip install 'lasp-sp[wandb]')")


def _open_wandb(project: str, run_dir: Path, settings: dict[str, Any] | None) -> Any:
    """The run of this directory, the same whenever it goes on."""
    import wandb

    known = run_dir / "wandb-id"
    if not known.exists():
        known.write_text(secrets.token_hex(8))
    name = run_dir.resolve().name
    run = wandb.init(
        project=project, name=name, id=known.read_text(), resume="allow", dir=str(run_dir), config=settings
    )
    run.define_metric("*", step_metric="step")  # steps that are taken again after a stop are written again
    return run


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    told = [f"step {step}/{steps}: loss {values['loss']:.4f}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    for name, format_ in (("grad_norm", "gradient norm {:.3g}"), ("lr", "lr {:.3g}"), ("memory", "{:.2f} GiB")):
        told += [format_.format(values[name])] if name in values else []
    return ", ".join(told)
