"""A trained model at longer contexts: `lasp extend`. It goes on at one length after the other, and is asked for needles
before and after."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
import tyro

from lasp.config import TrainConfig, require
from lasp.evaluation.needle import Needle, NeedleResult
from lasp.evaluation.results import aligned, save
from lasp.evaluation.subject import open_subject
from lasp.fields import Count, FilePath, Part, Positive, check_fields
from lasp.models import make_model
from lasp.pictures import empty_figure
from lasp.training import checkpoint
from lasp.training.paths import with_absolute_paths
from lasp.training.runtime import World, join_world
from lasp.training.starts import begin, last_config
from lasp.training.together import on_rank_0
from lasp.training.train import open_data, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Extension:
    """Stages of training at longer contexts, each a run of its own in `output`, the last one being the result.

    A step keeps about the tokens that it had. The learning rate is constant but for its warm-up, and falls to 0 in the
    last stage.
    """

    model: tyro.conf.Positional[FilePath]  # a run's directory
    output: FilePath
    length: Count | None = None  # tokens that the model is used to; None: the run's context_length
    factors: tuple[Count, ...] = (4, 16)  # of the stages: how many times that length is theirs
    steps: Count = 200  # of each stage
    data: FilePath | None = None  # prefix of token files with long documents, PREFIX_train and PREFIX_valid; the run's
    positions: Literal["scale", "keep", "none"] = "scale"  # of softmax layers (see `theta`)
    sequence_parallel: Count | None = None  # ranks that share a context; all of them if None
    lr: Positive | None = None  # a tenth of the run's if None
    needle_kind: Literal["single", "keys", "values"] = "single"  # as of `lasp eval needle`
    depths: tuple[Part, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # of needles
    samples: Count = 4  # needles for each length and depth
    haystack: FilePath | None = None  # a file of text; Python's documentation of its language if None

    def __post_init__(self) -> None:
        check_fields(self)
        growing = all(a < b for a, b in zip((1, *self.factors), self.factors, strict=False))
        require(bool(self.factors) and growing, "factors", self.factors, "growing numbers, from 2 on")

    def theta(self, theta: float | None, head_dim: int, factor: int) -> float | None:
        """The base of the rotations at that many times the context.

        scale: theta · factor^(K / (K - 2)), with which the slowest rotation turns by as much in the new context as
        before in the old one, and the fastest as before. keep: as it is. none: no rotations (NoPE, arXiv:2305.19466).
        """
        if self.positions == "none" or theta is None:
            return None
        return theta if self.positions == "keep" else theta * factor ** (head_dim / max(1, head_dim - 2))

    def lengths(self, trained: TrainConfig) -> list[int]:
        """Of the stages."""
        return [factor * (self.length or trained.context_length) for factor in self.factors]

    def stages(self, trained: TrainConfig) -> list[TrainConfig]:
        """The run of each stage, without the weights that it begins with."""
        lr, model, optimizer = self.lr or trained.optimizer.lr / 10, trained.model, trained.optimizer
        parallel = replace(trained.parallel, sequence_parallel=self.sequence_parallel, data_parallel=None)
        data = trained.data
        if self.data is not None:
            data = replace(data, train=f"{self.data}_train", valid=f"{self.data}_valid")
        tokens = trained.context_length * trained.batch_contexts
        stages = []
        for factor, length in zip(self.factors, self.lengths(trained), strict=True):
            context = max(length, trained.context_length)
            stages.append(
                replace(
                    trained,
                    model=replace(model, rope_theta=self.theta(model.rope_theta, model.key_dim, factor)),
                    data=data,
                    run_dir=f"{self.output}/{length}",
                    context_length=context,
                    curriculum=(),
                    parallel=parallel,
                    batch_contexts=max(1, round(tokens / context)),
                    contexts_at_once=max(1, trained.contexts_at_once * trained.context_length // context),
                    steps=self.steps,
                    eval_every=self.steps,
                    optimizer=replace(
                        optimizer,
                        lr=lr,
                        warmup_steps=self.steps // 10,
                        schedule="wsd",
                        decay_fraction=0.5,
                        min_ratio=0.0 if factor == self.factors[-1] else 1.0,
                    ),
                    initial_weights=f"{self.output}/start-{length}",
                )
            )
        return stages


def extend(extension: Extension) -> "ExtensionResult":
    """Trains all stages, each from its last checkpoint if there is one, and asks for needles at the run's length and at
    those of the stages; writes extension.json, .txt and .png to extension.output.

    Raises ValueError on every rank for a directory that is no run's, an output that was begun with another run, a
    retention model without positions, and what `train` and the needle test refuse.
    """
    trained = last_config(extension.model)
    attends = trained.model.attending > 0
    require(attends or extension.positions != "none", "positions", extension.positions, "softmax layers to have none")
    stages = extension.stages(trained)
    longer = extension.lengths(trained)
    lengths = (extension.length or trained.context_length, *longer)
    with join_world(stages[0]) as world:
        on_rank_0(dist.group.WORLD, lambda: begin(extension.output, model=extension.model))
        for stage in stages:
            open_data(with_absolute_paths(stage), world)  # whether there are such contexts
        before = _needles(extension, extension.model, lengths, world, stages[0])
        losses, source = [], checkpoint.require_latest(extension.model)
        for stage in stages:
            _begin(stage, source)
            losses.append(train(stage))
            source = checkpoint.require_latest(stage.run_dir)
        after = _needles(extension, stages[-1].run_dir, lengths, world, stages[-1])
        result = ExtensionResult(stages[-1].run_dir, before, after, dict(zip(longer, losses, strict=True)))
        on_rank_0(dist.group.WORLD, lambda: print(save(result, extension.output, "extension"), flush=True))
    return result


def _begin(stage: TrainConfig, source: Path) -> None:
    """Writes the weights of a checkpoint as those of the stage's model, whose positions are others."""
    assert stage.initial_weights is not None
    folder = stage.initial_weights

    def write() -> None:
        if not Path(folder, checkpoint.CONFIG_FILE).is_file():
            decoder = make_model(stage.model)
            if stage.dtype == "float64":
                decoder.double()
            checkpoint.load_model(source, decoder)
            checkpoint.save_weights(folder, decoder)

    on_rank_0(dist.group.WORLD, write)


def _needles(
    extension: Extension, model: str, lengths: Sequence[int], world: World, config: TrainConfig
) -> NeedleResult:
    needle = Needle(
        model=model,
        kind=extension.needle_kind,
        lengths=tuple(lengths),
        depths=extension.depths,
        samples=extension.samples,
        haystack=extension.haystack,
    )
    return needle.run(open_subject(model, world, config.parallel))


@dataclass(frozen=True)
class ExtensionResult:
    """model: the last stage's run. losses: held out, after each stage, by its length."""

    model: str
    before: NeedleResult
    after: NeedleResult
    losses: dict[int, float]

    def record(self) -> dict[str, Any]:
        needles = {name: result.record() for name, result in (("before", self.before), ("after", self.after))}
        return {"model": self.model, "losses": self.losses, "needles": needles}

    def table(self) -> str:
        """Needles found, in percent, and held-out losses."""
        lengths, _, before = self.before.grid()
        _, _, after = self.after.grid()
        rows = [["tokens", "found before", "found after", "held-out loss"]]
        for length, was, found in zip(lengths, before.mean(0), after.mean(0), strict=True):
            loss = f"{self.losses[length]:.4f}" if length in self.losses else ""
            rows.append([f"{length:,}", f"{100 * was:.0f}", f"{100 * found:.0f}", loss])
        return f"{aligned(rows)}\nthe model: {self.model}"

    def figure(self) -> "Figure":
        figure = empty_figure(10, 3.5)
        for place, (name, result) in enumerate((("before", self.before), ("after", self.after)), 1):
            title = f"needles found (%), {name}"
            result.draw(figure.add_subplot(1, 2, place, xlabel="tokens", ylabel="depth", title=title))
        return figure
