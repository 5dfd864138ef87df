"""Makes a table: tokenizer, data, what has not been trained, losses and recall. What was stopped goes on."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch.distributed as dist

from lasp.config import require
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
from lasp.training.runtime import World, join_world
from lasp.training.together import on_rank_0
from lasp.training.train import train

RESULT, CORPUS = "quality.json", "corpus.json"


def run(table: QualityTable) -> QualityResult:
    """Trains and evaluates every cell; writes quality.json, .txt and .png to table.run_dir.

    On the ranks that torchrun started each context is split over all of them. Raises what `train` and `prepare` raise,
    and ValueError for a directory with another corpus.
    """
    places = list(product(table.sizes, table.contexts, table.models, table.seeds))
    with join_world(table.run(places[0][2], places[0][0], places[0][1], places[0][3])) as world:
        on_rank_0(dist.group.WORLD, lambda: write_data(table))
        cells = []
        for size, context, model, seed in places:
            cells.append(evaluate(table, model, size, context, seed, world))
            if world.rank == 0:
                print(f"{model}, {size}, {context:,} tokens, seed {seed}: loss {cells[-1].loss:.4f}", flush=True)
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


def evaluate(table: QualityTable, model: str, size: str, context: int, seed: int, world: World) -> Cell:
    """Trains one cell, if there is no result of it, and evaluates it."""
    config = table.run(model, size, context, seed)

    def find() -> dict:
        train(config)
        subject = open_subject(config.run_dir, world, config.parallel)
        positions = LossByPosition(model=config.run_dir, contexts=table.held_out).run(subject)
        recall = RecallInText(model=config.run_dir, contexts=table.held_out).run(subject)
        cell = Cell(
            model=model,
            size=size,
            context=context,
            seed=seed,
            parameters=count_parameters(config.model),
            loss=positions.loss,
            positions=[asdict(one) for one in positions.intervals],
            distances=[asdict(one) for one in recall.distances],
        )
        return asdict(cell)

    return Cell(**remembered(config, RESULT, find))
