"""The sweeps of `lasp train`: models, learning rates and seeds on one recall task."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

from lasp.config import (
    LINEAR,
    MIXERS,
    OPTIONAL_CONV,
    SOFTMAX,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from lasp.data.tokenizer import ByteTokenizer
from lasp.evaluation.tasks.mqar import MQAR
from lasp.fields import Allowed, Count, FilePath, NotNegative, Positive, Seed, check_fields, require

CONV = "+conv"
MODEL_WORDS = (
    f"softmax, one of {', '.join(MIXERS)} ({CONV} behind {', '.join(OPTIONAL_CONV)} gives them a short convolution), "
    "or one of these and a pattern, as gla:LN"
)


class NamedModel(NamedTuple):
    """What a model's name says: fields of its configuration."""

    mixer: str
    pattern: str
    short_conv: bool


def parse_model(name: str) -> NamedModel:
    """Raises ValueError if it is none."""
    kind, colon, pattern = name.partition(":")
    mixer, conv, rest = kind.partition(CONV)
    if kind == "softmax":
        mixer, pattern = (MIXERS[0], SOFTMAX) if not colon else ("", pattern)
    elif not colon:
        pattern = LINEAR
    known = mixer in (OPTIONAL_CONV if conv else MIXERS) and not rest
    require(known and bool(pattern) and set(pattern) <= {LINEAR, SOFTMAX}, "models", name, MODEL_WORDS)
    return NamedModel(mixer, pattern, bool(conv))


ModelName = Annotated[str, Allowed(MODEL_WORDS, bool)]


@dataclass(frozen=True, kw_only=True)
class RecallSweep:
    """Trains every model at every width, learning rate and seed, and reports its accuracy for each number of pairs.

    A model has `layers` layers of one head of `width` channels, each with an MLP of four times the width.
    """

    run_dir: FilePath  # results, data, and a directory for each run
    models: tuple[ModelName, ...]  # a mixer or softmax; with a pattern of L and N, as gla+conv:LN, a hybrid
    task: MQAR = field(default_factory=MQAR)
    sequences: Count = 20_000  # to train on, for each number of pairs
    held_out: Count = 1_000  # sequences, for each number of pairs
    epochs: Count = 12
    batch: Count = 64  # sequences of a step
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2)  # the best one counts, by the mean accuracy of its seeds
    seeds: tuple[Seed, ...] = (0, 1, 2)
    widths: tuple[Count, ...] = (64,)
    layers: Count = 2
    init_std: NotNegative = 0.02  # of the weights' start
    decay_init: Positive = 1.0  # as of any model (lasp.model_config)
    weight_decay: NotNegative = 0.1
    dtype: Literal["bfloat16", "float32"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(sequence_parallel=None, fsdp=False))
    workers: Count | None = None  # runs at the same time: on one GPU, 12 if None; elsewhere processes, 1 if None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("models", "learning_rates", "seeds", "widths"):
            values = getattr(self, name)
            require(len(values) > 0, name, values, "at least one")
            require(len(set(values)) == len(values), name, values, "each once")
        total = self.sequences * len(self.task.pairs)
        require(self.batch <= total, "batch", self.batch, f"at most the {total} sequences that there are")
        there = self.held_out * len(self.task.pairs)
        require(self.batch <= there, "held_out", self.held_out, f"a batch of {self.batch} sequences, all in all")
        for name in self.models:
            length = len(parse_model(name).pattern)
            require(self.layers % length == 0, "layers", self.layers, f"a multiple of {name}'s pattern's length")

    @property
    def train_data(self) -> str:
        return f"{self.run_dir}/data/train"

    def held_out_data(self, pairs: int | None = None) -> str:
        """The held-out sequences of one number of pairs, or of all."""
        return f"{self.run_dir}/data/valid" + ("" if pairs is None else f"_{pairs}")

    def run(self, model: str, width: int, lr: float, seed: int) -> TrainConfig:
        """The training run of one cell of the sweep."""
        steps = self.epochs * self.sequences * len(self.task.pairs) // self.batch
        return TrainConfig(
            model=ModelConfig(
                vocab_size=max(self.task.vocab_size, ByteTokenizer.vocab_size),
                hidden_size=width,
                num_layers=self.layers,
                num_heads=1,
                intermediate_size=4 * width,
                **parse_model(model)._asdict(),
                init_std=self.init_std,
                decay_init=self.decay_init,
            ),
            data=DataConfig(
                train=self.train_data,
                valid=self.held_out_data(),
                eval_contexts=self.held_out * len(self.task.pairs) // self.batch,
            ),
            run_dir=f"{self.run_dir}/runs/{model.replace(':', '-')}-{width}-lr{lr:g}-seed{seed}",
            steps=steps,
            context_length=self.batch * self.task.length,
            optimizer=OptimizerConfig(
                lr=lr, weight_decay=self.weight_decay, warmup_steps=steps // 10, min_ratio=0.0, betas=(0.9, 0.98)
            ),
            parallel=replace(self.parallel, fsdp=self.parallel.fsdp or self.dtype == "bfloat16"),
            dtype=self.dtype,
            device=self.device,
            eval_every=max(1, steps // self.epochs),
            checkpoint_every=steps,
            checkpoint_keep=1,
            seed=seed,
        )


def mqar() -> RecallSweep:
    """Multi-query associative recall (Zoology, arXiv:2312.04927): all mixers, 4 to 64 pairs, 8,192 words; for a GPU."""
    hybrids = tuple(f"{mixer}:LN" for mixer in ("linear+conv", "gla+conv", "mamba2"))
    return RecallSweep(run_dir="runs/mqar", models=("softmax", *MIXERS, *hybrids), dtype="bfloat16")


def mqar_small() -> RecallSweep:
    """The same in small: three models at 2 to 8 pairs of 64 words; minutes on 2 CPU cores."""
    return RecallSweep(
        run_dir="runs/mqar_small",
        models=("softmax", "linear", "gated_delta_net"),
        task=MQAR(vocab_size=64, length=32, pairs=(2, 4, 8)),
        sequences=10_000,
        held_out=300,
        epochs=1,
        init_std=0.125,
        learning_rates=(5e-3,),
        seeds=(0,),
        device="cpu",
        workers=2,
    )


SWEEPS: dict[str, Callable[[], RecallSweep]] = {sweep.__name__: sweep for sweep in (mqar, mqar_small)}
