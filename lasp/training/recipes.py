"""Recipes: functions that return one validated configuration. `lasp train NAME` runs one, with any field overridden."""

from collections.abc import Callable

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.models import linear_llama3_1b, linear_llama3_8b


def quickstart() -> TrainConfig:
    """A small hybrid Linear-Llama on bytes, 8192 tokens split over 2 ranks: minutes on 2 CPU cores."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=257, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=384, mixer="gated_delta_net"
        ),
        data=DataConfig(train="runs/data/stdlib_train", valid="runs/data/stdlib_valid", eval_contexts=8),
        run_dir="runs/quickstart",
        steps=240,
        context_length=8192,
        dtype="float32",
        parallel=ParallelConfig(sequence_parallel=2, layout="zigzag", fsdp=False, timeout=120),
        optimizer=OptimizerConfig(lr=6e-3, warmup_steps=20, min_ratio=0.0),
        eval_every=40,
        checkpoint_every=120,
        checkpoint_keep=1,
    )


def linear_llama3_1b_128k() -> TrainConfig:
    """Linear-Llama3-1B (arXiv:2502.07563) at 131072 tokens over 8 GPUs, with a Llama-3 tokenizer.json of yours."""
    return _llama(linear_llama3_1b(), run_dir="runs/linear_llama3_1b_128k", lr=3e-4)


def linear_llama3_8b_128k() -> TrainConfig:
    """A hybrid in Llama-3-8B's shape at 131072 tokens over 8 GPUs, with a Llama-3 tokenizer.json of yours."""
    return _llama(linear_llama3_8b(), run_dir="runs/linear_llama3_8b_128k", lr=2e-4)


def _llama(model: ModelConfig, *, run_dir: str, lr: float) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=DataConfig(train="data/corpus_train", valid="data/corpus_valid", tokenizer="data/tokenizer.json"),
        run_dir=run_dir,
        steps=20_000,
        context_length=131_072,
        batch_contexts=8,
        parallel=ParallelConfig(sequence_parallel=8, layout="zigzag"),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=1000, schedule="wsd"),
        recompute=True,
        eval_every=500,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (quickstart, linear_llama3_1b_128k, linear_llama3_8b_128k)
}
