"""Runs a sweep: writes its data, trains what has not been trained, and reports. A sweep that was stopped goes on."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import TrainConfig, require
from lasp.data import TokenFile
from lasp.evaluation.labels import file_accuracy
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.recall.report import Cell, SweepResult
from lasp.evaluation.remembered import remembered
from lasp.evaluation.results import save
from lasp.evaluation.subject import open_subject
from lasp.evaluation.tasks import write
from lasp.models import Decoder, Memory, count_parameters
from lasp.parallel import SequenceParallel
from lasp.training.runtime import World, join_world
from lasp.training.together import on_rank_0
from lasp.training.train import train

RESULT = "recall.json"
HELD_OUT_SEED = 2**32  # no sequence of the training data's seed, 0


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
        require(sweep.workers == 1 or world.size == 1, "workers", sweep.workers, f"1 on {world.size} ranks")
        on_rank_0(dist.group.WORLD, lambda: write_data(sweep))
        if sweep.workers == 1:
            results = [_say(job, evaluate(job, world), world) for job in jobs]
        else:
            results = _in_processes(jobs, sweep.workers, world)
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
        loss = train(config)
        subject = open_subject(config.run_dir, world, config.parallel)
        files = {pairs: TokenFile(job.sweep.held_out_data(pairs)) for pairs in job.sweep.task.pairs}
        length = config.context_length
        cell = Cell(
            model=job.model,
            width=job.width,
            lr=job.lr,
            seed=job.seed,
            parameters=count_parameters(config.model),
            state=state_size(subject.model, job.sweep.task.length),
            loss=loss,
            accuracy={str(pairs): file_accuracy(subject, file, length).accuracy for pairs, file in files.items()},
        )
        return asdict(cell)

    return Cell(**remembered(config, RESULT, find))


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
        print(f"{job}: {100 * cell.mean:.1f} % right", flush=True)
    return cell


def _in_processes(jobs: list[Job], workers: int, world: World) -> list[Cell]:
    """Each job in one of so many processes; what a run prints goes to log.txt in its directory."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(_alone, job) for job in jobs]
        try:
            return [_say(job, future.result(), world) for job, future in zip(jobs, pending, strict=True)]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has begun goes on to its end
            raise


def _alone(job: Job) -> Cell:
    torch.set_num_threads(1)
    log = Path(job.config.run_dir) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), join_world(job.config) as world:
        return evaluate(job, world)
