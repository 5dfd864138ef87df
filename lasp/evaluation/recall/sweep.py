"""Runs a sweep: writes its data, trains what has not been trained, and reports. A sweep that was stopped goes on."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lasp.config import require
from lasp.evaluation.recall.at_once import train_at_once
from lasp.evaluation.recall.config import RecallSweep
from lasp.evaluation.recall.measure import diverged, measure
from lasp.evaluation.recall.report import RESULT, Cell, SweepResult
from lasp.evaluation.recall.search import Job, Search
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
    search = Search(sweep)
    with join_world(sweep.first_run) as world:
        require(sweep.workers in (None, 1) or world.size == 1, "workers", sweep.workers, f"1 on {world.size} ranks")
        on_rank_0(dist.group.WORLD, lambda: write_data(sweep))

        def add(job: Job, cell: Cell) -> None:
            search.add(job, cell)
            if world.rank == 0:
                print(f"{job}: {cell}", flush=True)

        if world.size == 1 and world.device.type == "cuda":
            train_at_once(search, add, world)
        elif sweep.workers in (None, 1):
            while (job := search.next()) is not None:
                add(job, evaluate(job, world))
        else:
            _in_processes(search, add, sweep.workers)
        found = search.result()
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
        try:
            train(config)
        except FloatingPointError:
            return asdict(diverged(job))
        return asdict(measure(job, open_subject(config.run_dir, world, config.parallel)))

    return Cell(**remembered(config, RESULT, find))


def _in_processes(search: Search, add: Callable[[Job, Cell], None], workers: int) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending: dict[Future[Cell], Job] = {}
        try:
            while True:
                while (job := search.next()) is not None:
                    pending[pool.submit(_alone, job)] = job
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    add(pending.pop(future), future.result())
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
