"""The runs of a sweep on one GPU, several at a time, in one thread.

It keeps some steps waiting on the GPU for every run in training. While these are taken it builds the next run, or saves
and evaluates one that has ended, and looks after the others in between; so nothing else happens while a step becomes a
graph.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from itertools import groupby

import torch

from lasp.config import require
from lasp.data import TokenFile
from lasp.evaluation.recall.graphed import Documents, GraphedRun
from lasp.evaluation.recall.job import Job
from lasp.evaluation.recall.measure import diverged, keep_losses, measure
from lasp.evaluation.recall.report import RESULT, Cell
from lasp.evaluation.remembered import keep, known
from lasp.evaluation.subject import Subject, Trained
from lasp.training import checkpoint
from lasp.training.ownership import hold
from lasp.training.paths import with_absolute_paths
from lasp.training.runtime import World
from lasp.training.same_run import record
from lasp.training.starts import keep_start
from lasp.training.train import open_data

AT_ONCE, MOST = 12, 32  # runs; PyTorch has so many streams
PAUSE = 1e-3  # seconds between two looks at them


class Place:
    """Where one run is after the other, with a stream that no other run is in."""

    run: GraphedRun | None = None

    def __init__(self, on_gpu: bool) -> None:
        self.stream = torch.cuda.Stream() if on_gpu else None

    def start(self, job: Job, finding: Generator[GraphedRun, None, Cell]) -> None:
        """finding: builds the run, is to be resumed when it is trained, and returns its cell."""
        self.job, self.finding = job, finding

    def go_on(self) -> bool:
        """With a run that is there; whether it is trained."""
        with torch.cuda.stream(self.stream):
            return self.run is not None and self.run.go_on()

    def resume(self) -> Cell | None:
        """The cell, if it is found."""
        self.run = None
        with torch.cuda.stream(self.stream):
            try:
                self.run = next(self.finding)
                return None
            except StopIteration as end:
                return end.value


def train_at_once(jobs: list[Job], world: World) -> Iterator[tuple[Job, Cell]]:
    """Finds their cells. Raises ValueError for more workers than streams."""
    sweep = jobs[0].sweep
    workers = sweep.workers or AT_ONCE
    require(workers <= MOST, "workers", workers, f"at most {MOST} on one GPU")
    _, _, fingerprints = open_data(jobs[0].config, world)
    documents = Documents(TokenFile(sweep.train_data), world.device)
    places = [Place(world.device.type == "cuda") for _ in range(workers)]

    def go_on() -> list[Place]:
        """Those whose run is trained."""
        return [place for place in places if place.go_on()]

    def of_kind(waiting: deque[Job]) -> Iterator[tuple[Job, Cell]]:
        while True:
            trained = go_on()
            free = [place for place in places if place.run is None]
            if trained:
                place = trained[0]
            elif free and waiting:
                place, job = free[0], waiting.popleft()
                place.start(job, find(job, documents, fingerprints, world, go_on))
            elif len(free) < len(places):
                time.sleep(PAUSE)
                continue
            else:
                return
            if (cell := place.resume()) is not None:
                yield place.job, cell

    try:
        for _, alike in groupby(jobs, key=lambda job: (job.model, job.width)):
            yield from of_kind(deque(alike))
    finally:
        for place in places:
            if place.run is not None:
                place.finding.close()


def find(
    job: Job, documents: Documents, fingerprints: dict[str, str], world: World, meanwhile: Callable[[], object]
) -> Generator[GraphedRun, None, Cell]:
    """Builds a run, if there is no result of it, and when it is trained saves and evaluates it."""
    given, config = job.config, with_absolute_paths(job.config)
    if (before := known(given, RESULT)) is not None:
        return Cell(**before)
    with hold(config.run_dir, world.hosts) as lock:
        run = GraphedRun(config, documents, world.device, meanwhile)
        keep_start(config, world.size)
        yield run
        try:
            keep_losses(config.run_dir, run.finish().tolist())
            seen = record(config.steps * config.context_length, fingerprints)
            meanwhile()
            checkpoint.save(config.run_dir, config.steps, run.weights, run.optimizer, config, lock, seen, world.saves)
            origin = Trained(run.model, config.data.tokenizer, None, run.model.embedding.weight.dtype)
            cell = measure(job, Subject(run.model.eval(), run.sp, world, origin), meanwhile)
        except FloatingPointError:
            cell = diverged(job)
    return Cell(**keep(given, RESULT, asdict(cell)))
