"""Runs a sweep: writes its data, trains what has not been trained, and reports. A sweep that was stopped goes on."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import require
from lasp.evaluation.recall.at_once import train_at_once
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.recall.job import Job
from lasp.evaluation.recall.measure import diverged, measure
from lasp.evaluation.recall.report import RESULT, Cell, SweepResult
from lasp.evaluation.remembered import remembered
from lasp.evaluation.results import save
from lasp.evaluation.subject import open_subject
from lasp.evaluation.tasks import write
from lasp.training.runtime import World, join_world
from lasp.training.together import on_rank_0
from lasp.training.train import train

HELD_OUT_SEED = 2**32  # no sequence of the training data's seed, 0


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
        found: dict[Job, Cell] = {}
        for job, cell in _cells(jobs, sweep.workers, world):
            found[job] = cell
            if world.rank == 0:
                print(f"{job}: {cell}", flush=True)
        result = SweepResult([found[job] for job in jobs])
        if world.rank == 0:
            print(save(result, sweep.run_dir, "mqar"), flush=True)
    return result


def _cells(jobs: list[Job], workers: int | None, world: World) -> Iterator[tuple[Job, Cell]]:
    """As they are found."""
    if world.size == 1 and world.device.type == "cuda":
        yield from train_at_once(jobs, world)
    elif workers in (None, 1):
        for job in jobs:
            yield job, evaluate(job, world)
    else:
        yield from _in_processes(jobs, workers)


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
        try:
            train(config)
        except FloatingPointError:
            return asdict(diverged(job))
        return asdict(measure(job, open_subject(config.run_dir, world, config.parallel)))

    return Cell(**remembered(config, RESULT, find))


def _in_processes(jobs: list[Job], workers: int | None) -> Iterator[tuple[Job, Cell]]:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(_alone, job): job for job in jobs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
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
