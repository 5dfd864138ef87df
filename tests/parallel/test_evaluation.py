"""Evaluations on many ranks find what one rank finds: losses by position, and answers to prompts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lasp.data import TokenFileWriter
from lasp.evaluation.config import Evaluation
from lasp.evaluation.likelihood import log_likelihoods
from lasp.evaluation.position import LossByPosition
from lasp.evaluation.prompts.prompt import Prompt
from lasp.evaluation.repeats import RecallInText
from lasp.evaluation.subject import Subject, Trained
from lasp.evaluation.writing import answers
from lasp.models import Decoder, tiny
from lasp.parallel import SequenceParallel
from lasp.parallel.groups import make_mesh
from lasp.training.runtime import World, join_world

pytestmark = [pytest.mark.mpi, pytest.mark.cpu_only("it evaluates on CPUs")]


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Decoder(replace(tiny(), vocab_size=257, init_std=0.25)).double().eval()


def on_all_ranks(model, evaluation):
    """The subject as `lasp eval` makes it, of a model that is there already."""
    with join_world(evaluation) as world:
        sp = SequenceParallel(world.mesh["sp"].get_group(), layout=evaluation.layout, device=world.device)
        return Subject(model, sp, world, Trained(model, "byte", None, torch.float64))


def on_this_rank(model, ranks):
    alone = torch.arange(ranks.size).view(-1, 1, 1)
    mesh = make_mesh("cpu", alone, ("each", "dp", "sp"))
    world = World(rank=0, size=1, device=torch.device("cpu"), mesh=mesh["dp", "sp"])
    return Subject(model, SequenceParallel(None), world, Trained(model, "byte", None, torch.float64))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_answers(ranks, model, layout):
    evaluation = Evaluation(model="there", layout=layout, device="cpu")
    many, one = on_all_ranks(model, evaluation), on_this_rank(model, ranks)
    ids = np.frombuffer(b"What is said about this? " * 3, np.uint8).astype(np.int64)
    nothing = Prompt(ids, ("\0",), 6, np.array([7, 7]))
    (written,) = answers(one, [nothing])
    assert len(written) > 0
    bytes_written = np.frombuffer(written.encode(errors="ignore"), np.uint8).astype(np.int64)
    guessed = Prompt(ids, ("\0",), 6, bytes_written[:3])
    assert answers(many, [nothing, guessed]) == [written] * 2  # after a wrong and a right guess


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_log_likelihoods(ranks, model, gen, layout):
    many, one = on_all_ranks(model, Evaluation(model="there", layout=layout, device="cpu")), on_this_rank(model, ranks)
    texts = [torch.randint(0, 257, (length,), generator=gen).tolist() for length in (21, 5, 1, 9, 14, 2)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for got, expected in zip(log_likelihoods(many, pairs), log_likelihoods(one, pairs), strict=True):
        assert got == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("kind", "each", "layout"),
    [
        (LossByPosition, "positions", "contiguous"),
        (LossByPosition, "positions", "zigzag"),
        (RecallInText, "distances", "zigzag"),
    ],
)
def test_readings(ranks, shared_tmp_path, model, gen, kind, each, layout):
    if ranks.rank == 0:
        with TokenFileWriter(shared_tmp_path / "data", "uint16", masked=True) as writer:
            for length in (70, 13, 41, 41, 29):
                tokens = torch.randint(0, 12, (length,), generator=gen).numpy()
                writer.add_document(tokens, (torch.rand(length, generator=gen) < 0.8).numpy())
    ranks.barrier("the data are written")
    evaluation = kind(model="there", layout=layout, device="cpu", data=str(shared_tmp_path / "data"), context_length=60)
    many, one = on_all_ranks(model, evaluation), on_this_rank(model, ranks)
    got, expected = evaluation.run(many).record(), single(evaluation, one)
    assert got.get("loss", 0.0) == pytest.approx(expected.get("loss", 0.0), rel=1e-10)
    assert len(got[each]) == len(expected[each]) > 1
    for a, b in zip(got[each], expected[each], strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def single(evaluation, subject):
    """The same on this rank alone, whose sums are those of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lasp.evaluation.reading.all_ranks", lambda x: x)
        return evaluation.run(subject).record()
