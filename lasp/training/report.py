"""What a run achieved: its loss curves as a picture, its held-out loss beside a bigram model's on the same tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasp.data import PackedContexts, bigram_loss
from lasp.data.bigram import MAX_VOCAB
from lasp.pictures import empty_figure
from lasp.training import checkpoint
from lasp.training.held_out import how_many
from lasp.training.metrics import read_metrics

PICTURE = "loss.png"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Losses in nats per token."""

    step: int
    valid_loss: float
    bigram_loss: float | None  # None for several corpora, and for vocabularies too large for a table of bigrams
    picture: Path

    def __str__(self) -> str:
        lines = [f"held-out loss after {self.step} steps: {self.valid_loss:.3f} nats per token"]
        if self.bigram_loss is not None:
            lines.append(f"a bigram model's on the same tokens: {self.bigram_loss:.3f} nats per token")
        return "\n".join([*lines, f"loss curves: {self.picture}"])


def report(run_dir: str) -> Report:
    """Draws run_dir/loss.png and returns the last held-out loss.

    Raises FileNotFoundError if the run left no metrics, ValueError if it left no evaluation or no checkpoint.
    """
    records = read_metrics(run_dir)
    evaluations = [(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]
    if not evaluations:
        raise ValueError(f"run_dir: got {run_dir!r}, expected a run that was evaluated at least once")
    bigram = _bigram_loss(checkpoint.read_config(checkpoint.require_latest(run_dir)))
    picture = Path(run_dir) / PICTURE
    draw([(r["step"], r["loss"]) for r in records if "loss" in r], evaluations, bigram, picture)
    step, loss = evaluations[-1]
    return Report(step=step, valid_loss=loss, bigram_loss=bigram, picture=picture)


def draw(
    training: list[tuple[int, float]], evaluations: list[tuple[int, float]], bigram: float | None, picture: Path
) -> None:
    """Writes the curves of (step, loss) pairs to a PNG, with a line at the bigram model's loss if that is known."""
    figure = empty_figure(7, 4.5)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    axes.plot(*zip(*training, strict=True), linewidth=0.8, alpha=0.6, label="training")
    axes.plot(*zip(*evaluations, strict=True), marker=".", label="held-out")
    if bigram is not None:
        axes.axhline(bigram, linestyle="--", color="grey", label="bigram model, held-out")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)


def _bigram_loss(config: dict[str, Any]) -> float | None:
    data, length = config["data"], config["context_length"]
    several = not all(isinstance(data[split], str) for split in ("train", "valid"))
    if config["model"]["vocab_size"] > MAX_VOCAB or several:
        return None
    options: dict[str, Any] = {"seed": 0, "shuffle": False, "vocab_size": config["model"]["vocab_size"]}
    train, valid = (PackedContexts(data[split], length, **options) for split in ("train", "valid"))
    held_out = (valid[i] for i in range(how_many(data["eval_contexts"], valid)))
    return bigram_loss(train.one_epoch(), held_out, options["vocab_size"])
