"""Recipes: functions that return one validated configuration. `lasp train NAME` runs one, with any field overridden."""

from collections.abc import Callable
from dataclasses import replace

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.models import linear_llama3_1b, linear_llama3_8b, linear_moe_a0_3b_2b, linear_moe_a1b_7b


def quickstart() -> TrainConfig:
    """A small hybrid Linear-Llama on bytes, 8192 tokens split over all ranks: minutes on 2 CPU cores."""
    return TrainConfig(
        model=ModelConfig(
            vocab_size=0, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=384, mixer="gated_delta_net"
        ),
        data=DataConfig(train="runs/data/stdlib_train", valid="runs/data/stdlib_valid", eval_contexts=None),
        run_dir="runs/quickstart",
        steps=240,
        context_length=8192,
        dtype="float32",
        parallel=ParallelConfig(sequence_parallel=None, layout="zigzag", fsdp=False, timeout=120),
        optimizer=OptimizerConfig(lr=6e-3, warmup_steps=20, min_ratio=0.0),
        eval_every=40,
        checkpoint_every=120,
        checkpoint_keep=1,
    )


def linear_llama3_1b_128k() -> TrainConfig:
    """Linear-Llama3-1B (arXiv:2502.07563) at 131072 tokens over 8 GPUs, with a Llama-3 tokenizer.json of yours."""
    return _on_8_gpus(linear_llama3_1b(), run_dir="runs/linear_llama3_1b_128k", lr=3e-4)


def linear_llama3_1b_1m() -> TrainConfig:
    """Linear-Llama3-1B, pure, at 1048576 tokens in segments of 65536 on one GPU, with a Llama-3 tokenizer.json."""
    whole = _on_8_gpus(linear_llama3_1b(pattern="L"), run_dir="runs/linear_llama3_1b_1m", lr=3e-4)
    return replace(
        whole,
        data=replace(whole.data, eval_contexts=1),
        context_length=1_048_576,
        segment_tokens=65_536,
        batch_contexts=1,
        parallel=ParallelConfig(layout="zigzag"),
    )


def linear_llama3_8b_128k() -> TrainConfig:
    """A hybrid in Llama-3-8B's shape at 131072 tokens over 8 GPUs, with a Llama-3 tokenizer.json of yours."""
    return _on_8_gpus(linear_llama3_8b(), run_dir="runs/linear_llama3_8b_128k", lr=2e-4)


def quickstart_moe() -> TrainConfig:
    """The quickstart with 8 experts in every layer, 2 for a token; `--parallel.expert-parallel` ranks share them."""
    dense = quickstart()
    model = replace(dense.model, num_experts=8, experts_per_token=2, expert_intermediate_size=192)
    return replace(dense, model=model, run_dir="runs/quickstart_moe")


def linear_moe_a0_3b_2b_128k() -> TrainConfig:
    """Linear-MoE A0.3B-2B (arXiv:2503.05447), pure, at 131072 tokens over 8 GPUs, with a Qwen2 tokenizer.json."""
    return _on_8_gpus(linear_moe_a0_3b_2b(pattern="L"), run_dir="runs/linear_moe_a0_3b_2b_128k", lr=1e-4, experts=8)


def linear_moe_a0_3b_2b_hybrid_128k() -> TrainConfig:
    """The same with softmax attention in every fourth layer."""
    return _on_8_gpus(linear_moe_a0_3b_2b(), run_dir="runs/linear_moe_a0_3b_2b_hybrid_128k", lr=1e-4, experts=8)


def linear_moe_a1b_7b_128k() -> TrainConfig:
    """Linear-MoE A1B-7B (arXiv:2503.05447), pure, at 131072 tokens over 8 GPUs, with a Qwen2 tokenizer.json."""
    return _on_8_gpus(linear_moe_a1b_7b(pattern="L"), run_dir="runs/linear_moe_a1b_7b_128k", lr=1e-4, experts=8)


def _on_8_gpus(model: ModelConfig, *, run_dir: str, lr: float, experts: int = 1) -> TrainConfig:
    return TrainConfig(
        model=model,
        data=DataConfig(train="data/corpus_train", valid="data/corpus_valid", tokenizer="data/tokenizer.json"),
        run_dir=run_dir,
        steps=20_000,
        context_length=131_072,
        batch_contexts=8,
        parallel=ParallelConfig(sequence_parallel=8, layout="zigzag", expert_parallel=experts),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=1000, schedule="wsd"),
        eval_every=500,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        quickstart_moe,
        linear_llama3_1b_128k,
        linear_llama3_1b_1m,
        linear_llama3_8b_128k,
        linear_moe_a0_3b_2b_128k,
        linear_moe_a0_3b_2b_hybrid_128k,
        linear_moe_a1b_7b_128k,
    )
}
