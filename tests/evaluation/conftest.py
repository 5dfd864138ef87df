"""A run that is evaluated: a tiny hybrid after two steps on bytes."""

from dataclasses import replace

import pytest

from lasp.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.data.prepare import prepare
from lasp.evaluation.config import Evaluation
from lasp.evaluation.subject import open_subject
from lasp.models import tiny
from lasp.training.runtime import join_world
from lasp.training.train import train
from tests.patience import PATIENCE


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Its configuration; float64, held-out documents of 300 to 700 tokens."""
    folder = tmp_path_factory.mktemp("evaluated")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"line {number} of a text\n" * (15 + 2 * number))
    prepare([folder], folder / "data", valid_fraction=0.4)
    config = TrainConfig(
        model=replace(tiny(), vocab_size=257, init_std=0.25),
        data=DataConfig(train=str(folder / "data_train"), valid=str(folder / "data_valid"), eval_contexts=1),
        run_dir=str(folder / "run"),
        steps=2,
        context_length=256,
        dtype="float64",
        device="cpu",
        parallel=ParallelConfig(timeout=PATIENCE, fsdp=False),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1),
    )
    train(config)
    return config


@pytest.fixture
def subject(run):
    evaluation = Evaluation(model=run.run_dir, device="cpu")
    with join_world(evaluation) as world:
        yield open_subject(run.run_dir, world, evaluation.parallel)
