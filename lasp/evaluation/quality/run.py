"""Makes a table: tokenizer, data, what has not been trained, losses and recall. What was stopped goes on."""

import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist

from lasp.config import TrainConfig, require
from lasp.data.bpe import train_on
from lasp.data.prepare import prepare
from lasp.evaluation.position import LossByPosition
from lasp.evaluation.quality.config import QualityTable
from lasp.evaluation.quality.report import Cell, QualityResult
from lasp.evaluation.remembered import remembered
from lasp.evaluation.repeats import RecallInText
from lasp.evaluation.results import save
from lasp.evaluation.subject import open_subject
from lasp.models import count_parameters
from lasp.training.runtime import World, join_world, take_gpu
from lasp.training.together import on_rank_0
from lasp.training.train import train

RESULT, CORPUS = "quality.json", "corpus.json"


@dataclass(frozen=True)
class Place:
    """Of a cell in the table."""

    size: str
    context: int
    model: str
    seed: int

    def config(self, table: QualityTable) -> TrainConfig:
        return table.run(self.model, self.size, self.context, self.seed)

    def __str__(self) -> str:
        return f"{self.model}, {self.size}, {self.context:,} tokens, seed {self.seed}"


def run(table: QualityTable) -> QualityResult:
    """Trains and evaluates every cell; writes quality.json, .txt and .png to table.run_dir.

    On the ranks that torchrun started each context is split over all of them. Raises what `train` and `prepare` raise,
    and ValueError for a directory with another corpus, for several workers there, or for more of them than GPUs.
    """
    places = [Place(*place) for place in product(table.sizes, table.contexts, table.models, table.seeds)]
    with join_world(places[0].config(table)) as world:
        require(table.workers == 1 or world.size == 1, "workers", table.workers, f"1 on {world.size} ranks")
        if world.device.type == "cuda":
            gpus = torch.cuda.device_count()
            require(table.workers <= gpus, "workers", table.workers, f"at most {gpus}, one for each GPU")
        on_rank_0(dist.group.WORLD, lambda: write_data(table))
        if table.workers == 1:
            cells = [_say(place, evaluate(table, place, world), world.rank) for place in places]
        else:
            cells = _in_processes(table, places)
        found = QualityResult(cells)
        if world.rank == 0:
            print(save(found, table.run_dir, "quality"), flush=True)
    return found


def write_data(table: QualityTable) -> None:
    """The tokenizer and the token files, unless they are there."""
    names = ("corpus", "suffixes", "vocab_size", "characters")
    settings = json.loads(json.dumps({name: getattr(table, name) for name in names}))
    file = Path(table.run_dir) / CORPUS
    if file.is_file():
        known = json.loads(file.read_text())
        require(known == settings, "corpus", settings, f"{known}, as in {file}; or another run_dir")
        return
    suffixes, most = table.suffixes, table.characters
    print(train_on(table.corpus, table.tokenizer, table.vocab_size, suffixes=suffixes, characters=most), flush=True)
    print(prepare(table.corpus, table.data, table.tokenizer, suffixes=suffixes, folders=True), flush=True)
    file.write_text(json.dumps(settings))


def evaluate(table: QualityTable, place: Place, world: World) -> Cell:
    """Trains one cell, if there is no result of it, and evaluates it."""
    config = place.config(table)

    def find() -> dict:
        train(config)
        subject = open_subject(config.run_dir, world, config.parallel)
        positions = LossByPosition(model=config.run_dir, contexts=table.held_out).run(subject)
        recall = RecallInText(model=config.run_dir, contexts=table.held_out).run(subject)
        cell = Cell(
            **asdict(place),
            parameters=count_parameters(config.model),
            loss=positions.loss,
            positions=[asdict(one) for one in positions.intervals],
            distances=[asdict(one) for one in recall.distances],
        )
        return asdict(cell)

    return Cell(**remembered(config, RESULT, find))


def _in_processes(table: QualityTable, places: list[Place]) -> list[Cell]:
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(table.workers):
        numbers.put(number)
    with ProcessPoolExecutor(table.workers, context, initializer=_take_gpu, initargs=(numbers,)) as pool:
        return list(pool.map(partial(_alone, table), places))


def _take_gpu(numbers: "SimpleQueue[int]") -> None:
    take_gpu(numbers.get())


def _alone(table: QualityTable, place: Place) -> Cell:
    """In a process of its own; what the run prints goes to log.txt in its directory."""
    config = place.config(table)
    log = Path(config.run_dir) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, redirect_stdout(file), join_world(config) as world:
        cell = evaluate(table, place, world)
    return _say(place, cell)


def _say(place: Place, cell: Cell, rank: int = 0) -> Cell:
    if rank == 0:
        print(f"{place}: loss {cell.loss:.4f}", flush=True)
    return cell
