"""Where runs and plans meet: the command `lasp plan`, what `recompute: auto` stands for, what to do without memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console

from lasp.config import DataConfig, DeepSpeedConfig, ModelConfig, ParallelConfig, TrainConfig, from_dict, require
from lasp.models import PRESETS
from lasp.plan import Job, Plan, Setting, advice, best, job_of, named, of_device, plan, recomputation, report
from lasp.plan.gpus import GIB, GPU
from lasp.plan.search import faster, options, smaller, with_graphs
from lasp.training import checkpoint
from lasp.training.paths import with_vocabulary
from lasp.training.recipes import RECIPES
from lasp.training.runtime import World
from lasp.training.together import together


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What whoever asks for a plan has decided on; None: nothing yet."""

    sequence_parallel: int | None = None
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    recompute_layers: int | None = None
    offload_activations: bool | None = None
    segment_tokens: int | None = None
    segment_offload: bool | None = None
    segment_graphs: int | None = None

    @property
    def any(self) -> bool:
        return self != Wishes()


@dataclass(frozen=True)
class Asked:
    """What of a model and of GPUs is other than a source has it. host_memory: GiB for each GPU."""

    gpus: int | None = None
    host_memory: float | None = None
    context: int | None = None
    pattern: str | None = None
    mixer: str | None = None

    @property
    def shape(self) -> dict[str, Any]:
        return {key: value for key, value in (("pattern", self.pattern), ("mixer", self.mixer)) if value is not None}

    def on(self, gpu: GPU) -> GPU:
        return gpu if self.host_memory is None else replace(gpu, host=self.host_memory * GIB)


def show(source: str, gpu: str, asked: Asked, wishes: Wishes, *, as_json: bool, picture: str | None) -> None:
    """Prints a plan for a preset, a recipe or a run's directory. Raises ValueError for what is none of them, and for
    what is no GPU or no setting."""
    job, own = _read(source, asked.on(named(gpu)), asked)
    made = _made(job, wishes if wishes.any else own)
    others = report.choices(made)
    if picture is not None:
        report.plot(made, picture)
    if as_json:
        print(json.dumps(report.as_json(made, others), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(report.table(made, others))
    console.print(f"{'fits' if made.fits else 'does not fit'}; to change: {advice(made)}", markup=False)
    if picture is not None:
        console.print(f"memory against context: {picture}", markup=False)


def _made(job: Job, wishes: Wishes) -> Plan:
    if not wishes.any:
        return best(job)
    ranks = job.gpus if wishes.sequence_parallel is None else wishes.sequence_parallel
    setting = Setting(
        sequence_parallel=ranks,
        offload_activations=bool(wishes.offload_activations),
        segment_tokens=wishes.segment_tokens,
        segment_offload=bool(wishes.segment_offload),
        segment_graphs=wishes.segment_graphs or 1,
    )
    if wishes.recompute == "auto":
        automatic = plan(job, recomputation(job, setting))
        if setting.segment_tokens is None or wishes.segment_graphs is not None:
            return automatic
        return faster(automatic, plan(job, with_graphs(job, replace(setting, recompute="full"))))
    return plan(job, replace(setting, recompute=wishes.recompute, recompute_layers=wishes.recompute_layers))


def _read(source: str, gpu: GPU, asked: Asked) -> tuple[Job, Wishes]:
    """A preset, a recipe or a run's directory as a job, and the settings that it has."""
    name = source.replace("-", "_")
    if name in PRESETS:
        require(asked.context is not None, "context", None, f"a number of tokens, for the preset {name}")
        model = PRESETS[name](**asked.shape)
        return Job(model=model, context=asked.context or 0, gpu=gpu, gpus=asked.gpus or 1), Wishes()
    if name in RECIPES:
        config = RECIPES[name]()
        if config.model.vocab_size == 0:
            config = with_vocabulary(config)
    else:
        known = ", ".join([*PRESETS, *RECIPES])
        require(Path(source).is_dir(), "model", source, f"a run's directory, or one of {known}")
        config = _saved(source)
    model, context = replace(config.model, **asked.shape), asked.context or config.context_length
    config, parallel = replace(config, model=model, context_length=context), config.parallel
    gpus = asked.gpus or (parallel.sequence_parallel or 1) * (parallel.data_parallel or 1)
    if gpus % ((parallel.sequence_parallel or 1) * (parallel.data_parallel or 1)):  # as many as it is not made for
        config = replace(config, parallel=replace(parallel, sequence_parallel=None, data_parallel=None))
        return job_of(config, gpu, gpus), Wishes()
    _, sequence_parallel = config.mesh_shape(gpus)
    return job_of(config, gpu, gpus), _wishes(config, sequence_parallel)


def _wishes(config: TrainConfig, sequence_parallel: int) -> Wishes:
    assert not isinstance(config.recompute, bool)
    names = [field.name for field in fields(Wishes) if field.name != "sequence_parallel"]
    same: dict[str, Any] = {name: getattr(config, name) for name in names}
    return Wishes(sequence_parallel=sequence_parallel, **same)


def _saved(run_dir: str) -> TrainConfig:
    """The settings of a run's last checkpoint, as far as a plan asks for them."""
    saved = checkpoint.read_config(checkpoint.require_latest(run_dir), verified=False)
    nested = {"model": ModelConfig, "parallel": ParallelConfig, "data": DataConfig, "deepspeed": DeepSpeedConfig}
    values = {name: from_dict(make, saved[name]) for name, make in nested.items() if name in saved}
    known = {field.name for field in fields(TrainConfig)} - {*nested, "optimizer", "allow_changed", "curriculum"}
    return TrainConfig(**values, **{name: saved[name] for name in known & saved.keys()})


def settled(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with a policy in the place of `recompute: auto`, the same on all ranks: on CPUs the least
    recomputation, on GPUs the least that fits by the plan for the one with the least memory."""
    if config.recompute != "auto":
        return config
    if world.device.type == "cpu":
        return replace(config, recompute="selective" if config.offload_activations else "none")
    gpus = together(dist.group.WORLD, lambda: of_device(world.device))
    least = replace(min(gpus, key=lambda gpu: gpu.memory), host=min(gpu.host for gpu in gpus))
    job = job_of(config, least, world.size)
    wishes = _wishes(config, world.mesh["sp"].size())
    setting = _made(job, wishes).setting
    graphs = None if config.segment_tokens is None else setting.segment_graphs
    recompute, layers = setting.recompute, setting.recompute_layers
    return replace(config, recompute=recompute, recompute_layers=layers, segment_graphs=graphs)


@contextmanager
def explained_memory(config: TrainConfig, world: World) -> Iterator[None]:
    """Of memory that does not suffice says which part has grown, and which settings the plan has for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if config.model.is_own:
            raise
        raise torch.OutOfMemoryError(out_of_memory(config, world, of_device(world.device), str(error))) from error


def out_of_memory(config: TrainConfig, world: World, gpu: GPU, error: str) -> str:
    made = _made(job_of(config, gpu, world.size), _wishes(config, world.mesh["sp"].size()))
    largest = sorted(made.memory.parts.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    fewer = smaller(made)
    change = "more GPUs or a shorter context"
    if fewer is not None:
        change = f"{options(fewer.setting, made.setting)}, {fewer.memory.total / GIB:.1f} GiB"
    wanted = ". ".join(error.split(". ")[:2])
    return (
        f"{wanted}. Of {gpu.memory / GIB:.1f} GiB the plan gives {made.memory.total / GIB:.1f} to the "
        f"{made.memory.moment}: {parts}. What has grown most with the context: {made.memory.grown}. "
        f"Proposed instead: {change} (lasp plan says more; if memory lies in pieces, "
        "PYTORCH_ALLOC_CONF=expandable_segments:True helps)"
    )
