"""Runs a sweep: writes its data, trains what has not been trained, and reports. A sweep that was stopped goes on."""

import json
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import ModelConfig, TrainConfig, require
from lasp.data import TokenFile
from lasp.evaluation.labels import file_accuracy
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.recall.graphed import Documents, GraphedRun
from lasp.evaluation.recall.report import Cell, SweepResult
from lasp.evaluation.remembered import remembered
from lasp.evaluation.results import save
from lasp.evaluation.subject import Subject, Trained, open_subject
from lasp.evaluation.tasks import write
from lasp.models import Decoder, Memory, count_parameters
from lasp.parallel import SequenceParallel
from lasp.training import checkpoint
from lasp.training.metrics import METRICS_FILE
from lasp.training.ownership import hold
from lasp.training.paths import with_absolute_paths
from lasp.training.runtime import World, join_world
from lasp.training.same_run import record
from lasp.training.starts import keep_start
from lasp.training.together import on_rank_0
from lasp.training.train import open_data, train

RESULT = "recall.json"
HELD_OUT_SEED = 2**32  # no sequence of the training data's seed, 0
AT_ONCE = 12  # runs of a GPU, of which some are being started or evaluated
_saving = Lock()  # messages of checkpoints go through one group


@dataclass(frozen=True)
class Job:
    sweep: RecallSweep
    model: str
    width: int
    lr: float
    seed: int

    @property
    def config(self) -> TrainConfig:
        return self.sweep.run(self.model, self.width, self.lr, self.seed)

    def __str__(self) -> str:
        return f"{self.model}, width {self.width}, learning rate {self.lr:g}, seed {self.seed}"


def run(sweep: RecallSweep) -> SweepResult:
    """Trains and evaluates every cell; writes mqar.json, .txt and .png to sweep.run_dir.

    On the ranks that torchrun started each run is spread over all of them. Raises what `train` raises, and ValueError
    for several workers there.
    """
    cells = product(sweep.models, sweep.widths, sweep.learning_rates, sweep.seeds)
    jobs = [Job(sweep, *cell) for cell in cells]
    with join_world(jobs[0].config) as world:
        require(sweep.workers in (None, 1) or world.size == 1, "workers", sweep.workers, f"1 on {world.size} ranks")
        on_rank_0(dist.group.WORLD, lambda: write_data(sweep))
        if world.size == 1 and world.device.type == "cuda":
            results = in_threads(jobs, sweep, world)
        elif sweep.workers in (None, 1):
            results = [_say(job, evaluate(job, world), world) for job in jobs]
        else:
            processes = ProcessPoolExecutor(sweep.workers, mp_context=get_context("spawn"))
            results = _at_once(jobs, world, processes, _alone)
        found = SweepResult(results)
        if world.rank == 0:
            print(save(found, sweep.run_dir, "mqar"), flush=True)
    return found


def write_data(sweep: RecallSweep) -> None:
    """The training data of all numbers of pairs together, and held-out data, together and of each."""
    task, kinds = sweep.task, len(sweep.task.pairs)
    write(task, sweep.train_data, sweep.sequences * kinds, seed=0)
    write(task, sweep.held_out_data(), sweep.held_out * kinds, seed=HELD_OUT_SEED)
    for pairs in task.pairs:
        write(replace(task, pairs=(pairs,)), sweep.held_out_data(pairs), sweep.held_out, seed=HELD_OUT_SEED + pairs)


def evaluate(job: Job, world: World) -> Cell:
    """Trains one cell, if there is no result of it, and evaluates it."""
    config = job.config

    def find() -> dict[str, Any]:
        train(config)
        return asdict(measure(job, open_subject(config.run_dir, world, config.parallel)))

    return Cell(**remembered(config, RESULT, partial(_or_diverged, job, find)))


def evaluate_graphed(job: Job, documents: Documents, fingerprints: dict[str, str], world: World) -> Cell:
    """The same for one of the cells that a GPU trains at a time, each in a thread."""
    given, config = job.config, with_absolute_paths(job.config)

    def find() -> dict[str, Any]:
        stream = torch.cuda.Stream() if world.device.type == "cuda" else None
        with torch.cuda.stream(stream), hold(config.run_dir, dist.group.WORLD) as lock:
            run = GraphedRun(config, documents, world.device)
            keep_start(config, world.size)
            keep_losses(config.run_dir, run.train().tolist())
            seen = record(config.steps * config.context_length, fingerprints)
            with _saving:
                checkpoint.save(
                    config.run_dir, config.steps, run.weights, run.optimizer, config, lock, seen, world.saves
                )
            origin = Trained(run.model, config.data.tokenizer, None, run.model.embedding.weight.dtype)
            return asdict(measure(job, Subject(run.model.eval(), run.sp, world, origin)))

    return Cell(**remembered(given, RESULT, partial(_or_diverged, job, find)))


def _or_diverged(job: Job, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find` gives, or the cell of a run whose loss was not finite: other cells are to be found all the same."""
    try:
        return find()
    except FloatingPointError:
        return asdict(_cell(job, None, {str(pairs): 0.0 for pairs in job.sweep.task.pairs}))


def keep_losses(run_dir: str, losses: list[float]) -> None:
    """Among the run's metrics, the means of a hundred stretches."""
    stretch = -(-len(losses) // 100)
    ends = [min(first + stretch, len(losses)) for first in range(0, len(losses), stretch)]
    points = [{"step": end, "loss": mean(losses[end - stretch : end])} for end in ends]
    (Path(run_dir) / METRICS_FILE).write_text("".join(f"{json.dumps(point)}\n" for point in points))


def measure(job: Job, subject: Subject) -> Cell:
    """A trained cell's accuracies and loss on what was held out."""
    config, kinds = job.config, job.sweep.task.pairs
    files = {str(pairs): TokenFile(job.sweep.held_out_data(pairs)) for pairs in kinds}
    found = {pairs: file_accuracy(subject, file, config.context_length) for pairs, file in files.items()}
    loss = sum(each.loss * each.labels for each in found.values()) / sum(each.labels for each in found.values())
    return _cell(job, loss, {pairs: each.accuracy for pairs, each in found.items()})


def _cell(job: Job, loss: float | None, accuracy: dict[str, float]) -> Cell:
    model = job.config.model
    return Cell(
        model=job.model,
        width=job.width,
        lr=job.lr,
        seed=job.seed,
        parameters=count_parameters(model),
        state=kept_numbers(model, job.sweep.task.length),
        loss=loss,
        accuracy=accuracy,
    )


@cache
def kept_numbers(config: ModelConfig, tokens: int) -> int:
    """`state_size` of such a model."""
    with torch.device("cpu"):
        return state_size(Decoder(config), tokens)


@torch.inference_mode()
def state_size(model: Decoder, tokens: int) -> int:
    """The numbers that a model keeps of so many tokens, in order to go on: states, tails, keys and values."""
    memory, device = Memory(), model.embedding.weight.device
    seq = SequenceParallel(None, device=device).sequence(tokens)
    model(torch.zeros(1, tokens, dtype=torch.int64, device=device), seq, memory=memory)
    return sum(_numbers(slot) for slots in memory.slots.values() for slot in slots)


def _numbers(slot: Any) -> int:
    return slot.numel() if isinstance(slot, torch.Tensor) else sum(map(_numbers, slot))


def _say(job: Job, cell: Cell, world: World) -> Cell:
    if world.rank == 0:
        diverged = " (its loss was not finite)" if cell.loss is None else ""
        print(f"{job}: {100 * cell.mean:.1f} % right{diverged}", flush=True)
    return cell


def in_threads(jobs: list[Job], sweep: RecallSweep, world: World) -> list[Cell]:
    """Each job in one of so many threads, on one GPU."""
    _, _, fingerprints = open_data(jobs[0].config, world)
    documents = Documents(TokenFile(sweep.train_data), world.device)
    pool = ThreadPoolExecutor(sweep.workers or AT_ONCE)
    return _at_once(jobs, world, pool, evaluate_graphed, documents, fingerprints, world)


def _at_once(jobs: list[Job], world: World, pool: Executor, work: Callable[..., Cell], *args: Any) -> list[Cell]:
    """Each job by one of the pool's workers."""
    with pool:
        pending = [pool.submit(work, job, *args) for job in jobs]
        try:
            return [_say(job, future.result(), world) for job, future in zip(jobs, pending, strict=True)]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has begun goes on to its end
            raise


def _alone(job: Job) -> Cell:
    """In a process: what the run prints goes to log.txt in its directory."""
    torch.set_num_threads(1)
    log = Path(job.config.run_dir) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), join_world(job.config) as world:
        return evaluate(job, world)
