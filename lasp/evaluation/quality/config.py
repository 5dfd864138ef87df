"""The tables of `lasp train`: models of several sizes on a corpus of source files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.evaluation.recall.config import ModelName, parse_model
from lasp.fields import Count, FilePath, Positive, Seed, check_fields, require

SIZES = {"mini": (64, 8), "20m": (320, 8), "70m": (512, 16), "120m": (704, 16)}  # hidden size, layers
Size = Literal["mini", "20m", "70m", "120m"]
HEAD_DIM = 64
AT_ONCE = 131_072  # tokens of short contexts that are computed together, which fill a GPU


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """Trains every model in every size, context and seed on the same tokens, and gives its loss by position and its
    recall by distance.

    The corpus is folders of text; the files of a folder are one document. Its tokenizer is trained on it.
    """

    run_dir: FilePath  # results, tokenizer, data, and a directory for each run
    corpus: tuple[FilePath, ...]  # folders, or what `lasp prepare` reads besides
    suffixes: tuple[str, ...] = (".c", ".h", ".S", ".rst", ".txt")
    vocab_size: Count = 32_768
    characters: Count = 200_000_000  # of the corpus, for the tokenizer
    models: tuple[ModelName, ...]  # a mixer or softmax; with a pattern of L and N, as gla:LLLN, a hybrid
    sizes: tuple[Size, ...] = ("20m",)
    contexts: tuple[Count, ...] = (16_384,)  # tokens
    seeds: tuple[Seed, ...] = (0,)
    tokens: Count = 500_000_000  # to train on
    step_tokens: Count = 262_144  # of a step
    lr: Positive = 2e-3
    held_out: Count = 64  # contexts, at most, of the table's losses and recall
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Count = 1  # runs at the same time, in processes of their own, each on a GPU of its own
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(sequence_parallel=None, layout="zigzag"))

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("corpus", "models", "sizes", "contexts", "seeds"):
            values = getattr(self, name)
            require(len(values) > 0, name, values, "at least one")
            require(len(set(values)) == len(values), name, values, "each once")
        require(self.step_tokens <= self.tokens, "step_tokens", self.step_tokens, f"at most tokens={self.tokens}")
        for length in self.contexts:
            fits = self.step_tokens % length == 0
            require(fits, "contexts", length, f"a divisor of step_tokens={self.step_tokens}")
        for name in self.models:
            pattern = parse_model(name).pattern
            for size in self.sizes:
                _, layers = SIZES[size]
                require(
                    layers % len(pattern) == 0, "models", name, f"a pattern that divides the {layers} layers of {size}"
                )

    @property
    def tokenizer(self) -> str:
        return f"{self.run_dir}/tokenizer.json"

    @property
    def data(self) -> str:
        """Prefix of the token files."""
        return f"{self.run_dir}/data/corpus"

    def run(self, model: str, size: str, context: int, seed: int) -> TrainConfig:
        """The training run of one cell of the table."""
        hidden, layers = SIZES[size]
        steps = self.tokens // self.step_tokens
        return TrainConfig(
            model=ModelConfig(
                vocab_size=self.vocab_size,
                hidden_size=hidden,
                num_layers=layers,
                num_heads=max(1, hidden // HEAD_DIM),
                intermediate_size=8 * hidden // 3 // 64 * 64,
                **parse_model(model)._asdict(),
            ),
            data=DataConfig(
                train=f"{self.data}_train",
                valid=f"{self.data}_valid",
                tokenizer=self.tokenizer,
                eval_contexts=1,
                shuffle_contexts=True,
            ),
            run_dir=f"{self.run_dir}/runs/{model.replace(':', '-')}-{size}-{context}-seed{seed}",
            steps=steps,
            context_length=context,
            batch_contexts=self.step_tokens // context,
            contexts_at_once=max(1, min(AT_ONCE, self.step_tokens) // context),
            optimizer=OptimizerConfig(lr=self.lr, warmup_steps=steps // 20),
            parallel=self.parallel,
            dtype=self.dtype,
            device=self.device,
            eval_every=max(1, steps // 10),
            checkpoint_every=max(1, steps // 5),
            checkpoint_keep=1,
            seed=seed,
        )


def quality() -> QualityTable:
    """Softmax, pure models, and hybrids of 1 in 8 and 1 in 4 on the Linux kernel's source; for a GPU."""
    mixers = ("gated_delta_net", "kda", "mamba2", "gla", "lightning")
    hybrids = tuple(f"gated_delta_net:{'L' * n}N" for n in (7, 3)) + tuple(f"{mixer}:LLLN" for mixer in mixers[1:])
    return QualityTable(run_dir="runs/quality", corpus=("linux",), models=("softmax", *mixers, *hybrids))


def quality_small() -> QualityTable:
    """The same in small, on the source text of Python's standard library; minutes on 2 CPU cores."""
    return QualityTable(
        run_dir="runs/quality_small",
        corpus=("stdlib",),
        suffixes=(".py",),
        vocab_size=1024,
        characters=1_000_000,
        models=("softmax", "gated_delta_net", "gated_delta_net:LLLN"),
        sizes=("mini",),
        contexts=(1024,),
        tokens=400_000,
        step_tokens=4096,
        held_out=8,
        dtype="float32",
        device="cpu",
        parallel=ParallelConfig(sequence_parallel=None, fsdp=False),
    )


TABLES: dict[str, Callable[[], QualityTable]] = {table.__name__: table for table in (quality, quality_small)}
