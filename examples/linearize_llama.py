"""A small Llama made linear, with what it recalls before and after; minutes on one GPU.

    python examples/linearize_llama.py

trains a Llama on texts with needles, extends its context to four times the length (`lasp extend`), and distils it
(`lasp import --distill`) at the short one. Everything goes to --folder; what was stopped goes on.
"""

import argparse
from pathlib import Path

from lasp.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from lasp.data.bpe import train_tokenizer
from lasp.distillation.config import Distillation, Linear
from lasp.distillation.run import distill
from lasp.evaluation.evaluate import evaluate
from lasp.evaluation.extension import Extension, extend
from lasp.evaluation.needle import Needle
from lasp.evaluation.prompts.prompt import topics
from lasp.evaluation.tasks import NeedleTexts, write
from lasp.integrations.convert import export_run
from lasp.training.train import train

SHORT, FACTOR, VOCABULARY, KEYS = 512, 4, 1024, 6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--folder", default="runs/linearize")
    options.add_argument("--pattern", default="LN", help="L becomes linear, N stays softmax")
    options.add_argument("--mixer", default="gated_delta_net")
    options.add_argument("--window", type=int, default=None)
    options.add_argument("--steps", type=int, default=3000, help="of the Llama; the other stages have parts of it")
    options.add_argument("--rank", type=int, default=32, help="of the adapters")
    options.add_argument("--sequences", type=int, default=40_000, help="texts to learn from")
    options.add_argument("--samples", type=int, default=4, help="needles for each length and depth")
    options.add_argument("--small", action="store_true", help="a model that learns nothing, in seconds")
    told = options.parse_args()
    folder, small = Path(told.folder), told.small

    tokenizer = str(folder / "tokenizer.json")
    train_tokenizer(iter([topics()]), tokenizer, VOCABULARY)
    rows, sequences = (2, 16) if small else (128, told.sequences)
    for name, length, number in (("short", SHORT, sequences), ("long", FACTOR * SHORT, sequences // 8)):
        task = NeedleTexts(length=length, keys=KEYS, tokenizer=tokenizer)
        for split, count, seed in (("train", number, 0), ("valid", 2 * rows, 1)):
            if not Path(folder, f"{name}_{split}.idx").exists():
                write(task, folder / f"{name}_{split}", count, seed)

    # 1. The Llama, at the short length and then at the long one.
    hidden, steps = (64, 4) if small else (256, told.steps)
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_layers=4,
            num_heads=hidden // 32,
            intermediate_size=3 * hidden,
            pattern="N",
            rope_theta=1e4,
            init_std=hidden**-0.5,
        ),
        data=DataConfig(
            train=str(folder / "short_train"), valid=str(folder / "short_valid"), tokenizer=tokenizer, eval_contexts=2
        ),
        run_dir=str(folder / "short"),
        steps=steps,
        context_length=rows * SHORT,  # of so many texts, as a batch
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=steps // 10, betas=(0.9, 0.98)),
        eval_every=max(1, steps // 4),
        checkpoint_every=steps,
        checkpoint_keep=1,
    )
    train(config)
    samples, depths = (1, (0.5,)) if small else (told.samples, (0.0, 0.25, 0.5, 0.75, 1.0))
    longer = Extension(
        model=config.run_dir,
        output=str(folder / "long"),
        length=SHORT,
        factors=(FACTOR,),
        steps=max(2, steps // 5),
        data=str(folder / "long"),
        lr=1e-3,
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
        context_length=rows * SHORT,
        match_steps=max(2, steps // 4),
        steps=max(2, 2 * steps // 5),
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
