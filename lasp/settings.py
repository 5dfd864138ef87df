"""Smaller parts of a run's configuration, of lasp.config: its data, its optimiser, DeepSpeed."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lasp.fields import (
    Beta,
    Count,
    CountOrZero,
    FilePath,
    NotNegative,
    Part,
    Positive,
    PositiveOrInf,
    SomePart,
    check_fields,
    require,
)
from lasp.notation import read_corpora


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token files as `lasp prepare` (or Megatron) writes them: path prefixes, without .bin and .idx."""

    train: FilePath | tuple[FilePath, ...]  # one corpus, or several with their weights: a:0.7 b:0.3
    valid: FilePath | tuple[FilePath, ...]  # what evaluations read: one corpus, or several, each for itself
    tokenizer: FilePath = "byte"  # "byte", or the path of a Hugging Face tokenizer.json
    eval_contexts: Count | None = 8  # held-out contexts in every evaluation, of each corpus; None: 8 at most
    shuffle_contexts: bool = False  # of each corpus, not its documents alone: steps see parts of several long ones

    def __post_init__(self) -> None:
        check_fields(self)
        read_corpora("data.train", self.train)
        read_corpora("data.valid", self.valid)

    @property
    def corpora(self) -> dict[str, Fraction | None]:
        """The prefixes of `train`, with their weights."""
        return read_corpora("data.train", self.train)

    @property
    def held_out_corpora(self) -> dict[str, Fraction | None]:
        """The prefixes of `valid`, with their weights in the mean of their losses."""
        return read_corpora("data.valid", self.valid)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule (equations in lasp.training.optimizer)."""

    lr: Positive = 3e-4  # at its highest
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # of the running means of gradients and their squares
    weight_decay: NotNegative = 0.1  # of matrices only
    schedule: Literal["cosine", "wsd"] = "cosine"  # of the learning rate; wsd: warm-up, stable, decay
    warmup_steps: CountOrZero = 100  # in which it rises from 0
    decay_fraction: SomePart = 0.2  # of the steps, at the end of a "wsd" run
    min_ratio: Part = 0.1  # learning rate at the end / lr
    clip_norm: PositiveOrInf = 1.0  # of the gradient's norm over all parameters and ranks

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """ZeRO (arXiv:1910.02054), for runs whose engine is DeepSpeed; sharded over all ranks."""

    stage: Literal[0, 1, 2, 3] = 1  # what is sharded: nothing, optimiser states, and gradients, and parameters
    offload: bool = False  # optimiser states and update to the CPU

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.stage > 0 or not self.offload, "offload", self.offload, "False with stage 0")
