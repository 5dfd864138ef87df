"""How a softmax model is made linear."""

from dataclasses import dataclass, field, fields
from typing import Literal

from lasp.config import FeatureMap, Mixer, ParallelConfig, Pattern, TrainConfig
from lasp.fields import Count, CountOrZero, FilePath, NotNegative, Positive, Seed, check_fields, require


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What becomes of a Llama's layers."""

    pattern: Pattern = "LLLN"  # L becomes linear, N stays softmax
    mixer: Mixer = "gated_delta_net"  # of the linear layers: their gate
    feature_map: FeatureMap | None = None  # of q and k, for the mixers that have one
    window: Count | None = None  # of softmax attention that linear layers keep, beside their state


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Two stages of training: each linear mixer matches the attention in its place; then the model the teacher's
    predictions."""

    tokenizer: FilePath | None = None  # of the token files; the source's own if None
    context_length: Count = 4096  # tokens
    batch_contexts: Count = 1  # of a step, over all ranks
    match_steps: CountOrZero = 500  # of the first stage
    match_lr: Positive = 3e-3  # learning rate of the first stage
    steps: Count = 1000  # of the second stage
    lr: Positive = 1e-3  # learning rate of the second stage
    rank: CountOrZero = 16  # of the second stage's adapters; 0: all weights are trained
    divergence: NotNegative = 1.0  # weight of the Kullback-Leibler divergence from the teacher's predictions
    cross_entropy: NotNegative = 1.0  # weight of the labels' loss
    temperature: Positive = 1.0  # of both predictions, in the divergence
    eval_contexts: Count = 8  # held-out contexts in every evaluation
    checkpoint_every: Count = 500  # steps
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of the compute
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs if every rank can have one
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(sequence_parallel=None, layout="zigzag"))
    recompute: Literal["none", "selective", "full"] = "none"  # what backward computes again of the layers
    seed: Seed = 0  # of what a Llama has no weights for, adapters and the order of documents

    def __post_init__(self) -> None:
        check_fields(self)
        told = self.divergence + self.cross_entropy
        require(told > 0, "divergence", self.divergence, "more than 0 where cross_entropy is 0")


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainConfig):
    """The training run of one stage."""

    stage: Literal["match", "distill"]
    rank: CountOrZero
    divergence: NotNegative
    cross_entropy: NotNegative
    temperature: Positive

    def plain(self, run_dir: str) -> TrainConfig:
        """Of its result, which is a run like any other."""
        values = {each.name: getattr(self, each.name) for each in fields(TrainConfig)}
        return TrainConfig(**{**values, "run_dir": run_dir, "initial_weights": None})
