"""A small Llama made linear, with what it recalls before and after; minutes on one GPU.

    python examples/linearize_llama.py

trains a Llama to recall pairs and answers, then on texts with needles, extends its context to four times the length
(`lasp extend`), and distils it (`lasp import --distill`) at the short one. Everything goes to --folder; what was
stopped goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from lasp.data.bpe import train_tokenizer
from lasp.distillation.config import Distillation, Linear
from lasp.distillation.run import distill
from lasp.evaluation.evaluate import evaluate
from lasp.evaluation.extension import Extension, extend
from lasp.evaluation.needle import Needle
from lasp.evaluation.prompts.prompt import topics
from lasp.evaluation.tasks import MQAR, NeedleTexts, write
from lasp.integrations.convert import export_run
from lasp.training import checkpoint
from lasp.training.train import train

SHORT, FACTOR, VOCABULARY, KEYS = 256, 4, 1024, 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", default="runs/linearize")
    options.add_argument("--pattern", default="LN", help="L becomes linear, N stays softmax")
    options.add_argument("--mixer", default="gated_delta_net")
    options.add_argument("--window", type=int, default=None)
    options.add_argument("--steps", type=int, default=18_000, help="of the Llama; the other stages have parts of it")
    options.add_argument("--rank", type=int, default=32, help="of the adapters")
    options.add_argument("--sequences", type=int, default=64_000, help="texts to learn from")
    options.add_argument("--samples", type=int, default=8, help="needles for each length and depth")
    options.add_argument("--small", action="store_true", help="a model that learns nothing, in seconds")
    told = options.parse_args()
    folder, small = Path(told.folder), told.small

    tokenizer = str(folder / "tokenizer.json")
    train_tokenizer(iter([topics()]), tokenizer, VOCABULARY)
    rows, sequences = (2, 16) if small else (32, told.sequences)
    texts = NeedleTexts(length=SHORT, keys=KEYS, tokenizer=tokenizer)
    tasks: dict[str, MQAR | NeedleTexts] = {
        "pairs": MQAR(vocab_size=VOCABULARY, length=SHORT, pairs=(2, 4, 8, 16)),
        "answers": replace(texts, answers_only=True),
        "short": texts,
        "long": replace(texts, length=FACTOR * SHORT),
    }
    for name, task in tasks.items():
        for split, count, seed in (("train", sequences // (task.length // SHORT), 0), ("valid", 4 * rows, 1)):
            if not Path(folder, f"{name}_{split}.idx").exists():
                write(task, folder / f"{name}_{split}", count, seed)

    # 1. The Llama: recall alone, then texts of the short length, and of the long one.
    hidden, steps = (64, 4) if small else (256, told.steps)
    both = tuple(str(folder / f"{name}_train") for name in ("pairs", "answers"))
    recall = TrainConfig(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_layers=4,
            num_heads=hidden // 64,
            intermediate_size=3 * hidden,
            pattern="N",
            rope_theta=1e4,
        ),
        data=DataConfig(train=both, valid=str(folder / "answers_valid"), tokenizer=tokenizer, eval_contexts=2),
        run_dir=str(folder / "recall"),
        steps=max(2, 2 * steps // 5),
        context_length=rows * SHORT,  # of so many texts, as a batch
        optimizer=OptimizerConfig(
            lr=1.5e-3, warmup_steps=steps // 100, betas=(0.9, 0.98), schedule="wsd", decay_fraction=0.4, min_ratio=0.0
        ),
        eval_every=max(1, steps // 5),
        checkpoint_every=steps,
        checkpoint_keep=1,
    )
    train(recall)
    config = replace(
        recall,
        data=replace(recall.data, train=str(folder / "short_train"), valid=str(folder / "short_valid")),
        run_dir=str(folder / "short"),
        steps=steps,
        initial_weights=str(checkpoint.require_latest(recall.run_dir)),
    )
    train(config)
    samples, depths = (1, (0.5,)) if small else (told.samples, (0.0, 0.25, 0.5, 0.75, 1.0))
    longer = Extension(
        model=config.run_dir,
        output=str(folder / "long"),
        length=SHORT,
        factors=(FACTOR,),
        steps=max(2, steps // 30),
        data=str(folder / "long"),
        lr=5e-4,
        depths=depths,
        samples=samples,
    )
    llama = folder / "llama"
    extended = extend(longer)
    if not llama.exists():
        export_run(extended.model, str(llama), as_llama=True)

    # 2. The Llama made linear, at the short length.
    linear = folder / f"{told.pattern}-{told.mixer}-{told.window}"
    settings = Distillation(
        context_length=2 * rows * SHORT,
        match_steps=max(2, steps // 30),
        steps=max(2, steps // 15),
        rank=told.rank,
        eval_contexts=2,
    )
    layers = Linear(pattern=told.pattern, mixer=told.mixer, window=told.window)
    losses = distill(str(llama), str(linear), str(folder / "short"), layers, settings)

    # 3. Before and after.
    after = evaluate(Needle(model=str(linear), lengths=(SHORT, FACTOR * SHORT), depths=depths, samples=samples))
    for name, needles in (("teacher", extended.after), ("distilled", after)):
        lengths, _, grid = needles.grid()
        found = ", ".join(f"{part:.0%} at {length:,}" for length, part in zip(lengths, grid.mean(0), strict=True))
        print(f"{name}: held-out loss {losses[name]:.4f}, needles found: {found} tokens")


if __name__ == "__main__":
    main()
