from dataclasses import replace

import pytest

import lasp.training.train
from lasp.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.data import TokenFileWriter
from lasp.models import tiny
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token files of the byte tokenizer: documents of many lengths, words in a random order."""
    import random

    folder = tmp_path_factory.mktemp("data")
    draw = random.Random()
    words = [b"alpha ", b"beta ", b"gamma\n", b"delta "]
    for split, documents in (("train", 40), ("valid", 10)):
        with TokenFileWriter(folder / split, "uint16") as writer:
            for _ in range(documents):
                text = b"".join(draw.choices(words, k=draw.randint(1, 60)))
                writer.add_document([*text, 256])
    return DataConfig(train=str(folder / "train"), valid=str(folder / "valid"), eval_contexts=2)


@pytest.fixture
def trained(monkeypatch):
    """The configurations that the command was told to train; it trains none."""
    configs = []
    monkeypatch.setattr(lasp.training.train, "train", configs.append)
    return configs


@pytest.fixture
def config(data, tmp_path):
    """Six steps of a tiny hybrid on one rank, in float64."""
    return TrainConfig(
        model=replace(tiny(), vocab_size=257),
        data=data,
        run_dir=str(tmp_path / "run"),
        steps=6,
        context_length=96,
        batch_contexts=2,
        dtype="float64",
        device="cpu",
        parallel=ParallelConfig(timeout=PATIENCE, fsdp=False),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        eval_every=3,
        checkpoint_every=3,
    )
