"""Recall on many ranks is that of one: training on sequences of equal length, rows of a batch, and accuracy."""

from dataclasses import replace

import pytest
import torch

from lasp.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from lasp.data import IGNORED, PackedContexts, TokenFile
from lasp.evaluation.labels import file_accuracy
from lasp.evaluation.subject import open_subject
from lasp.evaluation.tasks import MQAR, write
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from lasp.training.metrics import read_metrics
from lasp.training.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from lasp.training.runtime import join_world
from lasp.training.train import train
from tests.patience import PATIENCE

pytestmark = [pytest.mark.mpi, pytest.mark.cpu_only("it trains on CPUs")]
LENGTH, ROWS, STEPS = 34, 6, 3


@pytest.fixture
def config(ranks, shared_tmp_path):
    task = MQAR(vocab_size=64, length=LENGTH, pairs=(2, 5))
    if ranks.rank == 0:
        for seed, split in enumerate(("train", "valid")):
            write(task, shared_tmp_path / split, 4 * ROWS, seed)
    ranks.barrier(f"{shared_tmp_path} is written")
    return TrainConfig(
        model=replace(tiny(pattern="LN"), num_layers=2, vocab_size=257),
        data=DataConfig(train=str(shared_tmp_path / "train"), valid=str(shared_tmp_path / "valid"), eval_contexts=4),
        run_dir=str(shared_tmp_path / "run"),
        steps=STEPS,
        context_length=LENGTH * ROWS,
        dtype="float64",
        device="cpu",
        parallel=ParallelConfig(timeout=PATIENCE, fsdp=False, sequence_parallel=None),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        eval_every=STEPS,
        checkpoint_every=STEPS,
    )


def alone(config):
    """(losses, accuracy after them) of the same run, written plainly, one document after the other."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model).double()
    optimizer = build_optimizer(model, config.optimizer)
    seq = SequenceParallel(None).sequence(LENGTH)

    def documents(context):
        for start in range(0, context.length, LENGTH):
            yield context.tokens(start, start + LENGTH)[None], context.labels(start, start + LENGTH)

    losses = []
    training = PackedContexts(config.data.train, config.context_length, seed=config.seed)
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, STEPS))
        parts = [(model(tokens, seq)[0], labels) for tokens, labels in documents(training[step])]
        logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(model, config.optimizer.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    right = []
    with torch.no_grad():
        for context in PackedContexts(config.data.valid, config.context_length, seed=0, shuffle=False).one_epoch():
            for tokens, labels in documents(context):
                right += (model(tokens, seq)[0].argmax(-1) == labels)[labels != IGNORED].tolist()
    return losses, sum(right) / len(right)


@pytest.mark.parametrize(
    "layout",
    [pytest.param("contiguous", marks=pytest.mark.ranks(2)), pytest.param("zigzag", marks=pytest.mark.ranks(3))],
)
def test_recall_is_trained_and_measured_as_on_one_rank(ranks, config, layout):
    config = replace(config, parallel=replace(config.parallel, layout=layout), run_dir=f"{config.run_dir}-{layout}")
    losses, right = alone(config)
    train(config)
    ranks.barrier(f"{config.run_dir} is saved")
    got = [record["loss"] for record in read_metrics(config.run_dir) if "loss" in record]
    assert got == pytest.approx(losses, rel=1e-9)
    with join_world(config) as world:
        subject = open_subject(config.run_dir, world, config.parallel)
        found = file_accuracy(subject, TokenFile(config.data.valid), 3 * LENGTH)
    assert found.accuracy == pytest.approx(right, abs=1e-12)
    assert found.labels == 4 * ROWS * 7 // 2
