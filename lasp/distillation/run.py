"""Makes a Llama linear: what `lasp import --distill` does.

OUTPUT/start          the student's first weights, and OUTPUT/matched, OUTPUT/distilled: the stages' runs
OUTPUT/checkpoints    the result, a run's directory for `lasp eval`, `lasp generate`, `lasp export`
OUTPUT/distillation.json    held-out losses before and after
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import LINEAR, DataConfig, OptimizerConfig, require
from lasp.distillation.config import Distillation, Linear, StageConfig
from lasp.distillation.low_rank import adapt, merge
from lasp.distillation.matching import Matching
from lasp.distillation.student import Student
from lasp.integrations.convert import read_llama
from lasp.integrations.llama import from_llama
from lasp.models import Decoder
from lasp.training import checkpoint, storage
from lasp.training.initial import build_kind
from lasp.training.paths import keep_tokenizer, with_absolute_paths
from lasp.training.runtime import World, join_world, sequence_parallel
from lasp.training.starts import begin
from lasp.training.together import on_rank_0
from lasp.training.train import evaluate_all, open_data, train

RESULT = "distillation.json"


def distill(source: str, output: str, data: str, linear: Linear, settings: Distillation) -> dict[str, float]:
    """Trains both stages, each from its last checkpoint if there is one; returns the held-out losses.

    source: the directory of a Llama, or of a softmax decoder that `lasp export` wrote. data: prefix of token files, as
    `lasp prepare` writes them. Raises ValueError on every rank as `import_weights` and `train` do, if no layer becomes
    linear, and if `output` holds a run or was begun with another Llama.
    """
    require(LINEAR in linear.pattern, "pattern", linear.pattern, f"at least one {LINEAR}")
    start = f"{output}/start"
    llama = read_llama(source)
    torch.manual_seed(settings.seed)
    first = from_llama(llama, **vars(linear)).float()
    tokenizer = settings.tokenizer or source
    stage = partial(_stage, first, output, data, tokenizer, settings)
    match = stage("match", initial=start)
    with join_world(match) as world:
        teacher = from_llama(llama, pattern="N").to(world.device, getattr(torch, settings.dtype)).eval()
        teacher.requires_grad_(False)
        on_rank_0(dist.group.WORLD, lambda: begin(output, source=source))
        on_rank_0(dist.group.WORLD, lambda: _keep_start(start, first))
        losses = {"teacher": _held_out(teacher, match, world)}
        initial = start
        if settings.match_steps:
            losses["matched"] = train(match, partial(_matching, teacher))
            initial = str(checkpoint.require_latest(match.run_dir))
        last = stage("distill", initial=initial)
        losses["distilled"] = train(last, partial(_student, teacher, last))
        _finish(last, output, losses, world)
        if world.rank == 0:
            print("\n".join(f"{name}: held-out loss {loss:.4f}" for name, loss in losses.items()), flush=True)
    return losses


def _stage(
    first: Decoder,
    output: str,
    data: str,
    tokenizer: str,
    settings: Distillation,
    name: Any,
    *,
    initial: str,
) -> StageConfig:
    matches = name == "match"
    steps, lr = (settings.match_steps, settings.match_lr) if matches else (settings.steps, settings.lr)
    return StageConfig(
        stage=name,
        rank=settings.rank,
        divergence=settings.divergence,
        cross_entropy=settings.cross_entropy,
        temperature=settings.temperature,
        model=first.config,
        data=DataConfig(
            train=f"{data}_train", valid=f"{data}_valid", tokenizer=tokenizer, eval_contexts=settings.eval_contexts
        ),
        run_dir=f"{output}/{'matched' if matches else 'distilled'}",
        steps=max(1, steps),
        context_length=settings.context_length,
        batch_contexts=settings.batch_contexts,
        initial_weights=initial,
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.0, warmup_steps=steps // 20, min_ratio=0.0, betas=(0.9, 0.98)),
        parallel=settings.parallel,
        dtype=settings.dtype,
        device=settings.device,
        recompute=settings.recompute,
        eval_every=max(1, steps),
        checkpoint_every=settings.checkpoint_every,
        checkpoint_keep=1,
        seed=settings.seed,
    )


def _keep_start(folder: str, decoder: Decoder) -> None:
    """Writes it, unless it is there from an earlier start."""
    if not Path(folder, checkpoint.CONFIG_FILE).is_file():
        checkpoint.save_weights(folder, decoder)


def _matching(teacher: Decoder, config: Any, device: torch.device) -> Matching:
    model = build_kind(Matching, config, device)
    model.follow(teacher)
    return model


def _student(teacher: Decoder, stage: StageConfig, config: Any, device: torch.device) -> Student:
    model = build_kind(Student, config, device)
    adapt(model, stage.rank)
    model.follow(teacher, stage)
    return model


def _held_out(teacher: Decoder, config: StageConfig, world: World) -> float:
    _, held_out, _ = open_data(with_absolute_paths(config), world)
    sp = sequence_parallel(config.parallel, teacher.config, world)
    loss = evaluate_all(teacher, held_out, sp, world)["valid_loss"]
    teacher.eval()
    return loss


def _finish(last: StageConfig, output: str, losses: dict[str, float], world: World) -> None:
    """Writes the last stage's model, its adapters merged, as a checkpoint of the run in `output`."""
    config = with_absolute_paths(last.plain(output))

    def save(directory: Path) -> None:
        decoder = Student(config.model)
        adapt(decoder, last.rank)
        checkpoint.load_model(checkpoint.require_latest(last.run_dir), decoder)
        merge(decoder)
        storage.save({"model": decoder.state_dict()}, directory, alone=True)

    def write(directory: Path) -> list[Path]:
        on_rank_0(dist.group.WORLD, lambda: save(directory))
        return list(directory.glob("__*")) if world.rank == 0 else []

    checkpoint.commit(output, config.steps, config, write)
    on_rank_0(dist.group.WORLD, lambda: keep_tokenizer(config))
    on_rank_0(dist.group.WORLD, lambda: Path(output, RESULT).write_text(json.dumps(losses, indent=1) + "\n"))
