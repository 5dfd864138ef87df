"""The recall tasks against their definitions, sequence by sequence, and as data sets."""

import re

import numpy as np
import pytest

from lasp import cli
from lasp.data import IGNORED, PackedContexts, TokenFile
from lasp.data.tokenizer import ByteTokenizer
from lasp.evaluation.tasks import (
    MQAR,
    TASKS,
    Compression,
    FuzzyRecall,
    InContextRecall,
    NeedleTexts,
    SelectiveCopying,
    choice,
    write,
)
from lasp.evaluation.tasks.choice import distinct, distinct_uniform
from lasp.evaluation.tasks.dataset import draw

SEQUENCES = 60


def sequences(task, seed=None):
    seed = np.random.default_rng().integers(2**32) if seed is None else seed
    (tokens, mask), *_ = draw(task, SEQUENCES, seed)
    return [(row.tolist(), np.flatnonzero(labels).tolist()) for row, labels in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_its_promises(name):
    task = TASKS[name]
    (tokens, mask), *_ = blocks = list(draw(task, 1100, 7))
    assert [len(block) for block, _ in blocks] == [1000, 100]
    assert tokens.shape == mask.shape == (1000, task.length)
    assert tokens.min() >= 0
    assert tokens.max() < task.vocab_size
    assert not mask[:, 0].any()
    assert mask.any(1).all()
    for (again, _), (first, _) in zip(draw(task, 1100, 7), blocks, strict=True):
        np.testing.assert_array_equal(again, first)
    assert (next(draw(task, 1000, 8))[0] != tokens).any()


def test_mqar():
    task = MQAR(vocab_size=64, length=40, pairs=(2, 3, 10))
    for number, (row, labels) in enumerate(sequences(task)):
        pairs = task.pairs[number % 3]
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == len(labels) == pairs
        assert all(1 <= key < 32 <= value < 64 for key, value in known.items())
        assert sorted(row[place - 1] for place in labels) == sorted(known)
        assert all(row[place] == known[row[place - 1]] and place % 2 == 1 and place > 2 * pairs for place in labels)


def test_mqar_asks_early_places_more_often_for_small_powers():
    def mean_place(power):
        tasks = draw(MQAR(vocab_size=64, length=60, pairs=(4,), power=power), 1000, 0)
        return np.concatenate([np.nonzero(mask)[1] for _, mask in tasks]).mean()

    assert mean_place(0.01) + 5 < mean_place(1.0) == pytest.approx(34, abs=1)  # the middle of 9, 11 … 59


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_in_context_recall(noise):
    task = InContextRecall(words=8, length=30, noise=noise)
    noisy = 0
    for row, labels in sequences(task):
        known, expected = {}, []
        for place in range(0, 30, 2):
            key, value = row[place : place + 2]
            if key >= 8:
                assert value >= 8
                noisy += 1
                continue
            assert key < 4 <= value < 8
            if key in known:
                assert known[key] == value
                expected.append(place + 1)
            known[key] = value
        assert labels == expected
        assert labels[-1] == 29
    assert noisy == pytest.approx(noise * 13 * SEQUENCES, abs=100)


def test_fuzzy_recall():
    task = FuzzyRecall(words=8, length=60, longest=3, pairs=4)
    sizes = set()
    for row, labels in sequences(task):
        place = next(i for i, word in enumerate(row) if word < 8)
        assert set(row[:place]) <= {8}
        known = {}
        while place < 60:
            start = place
            while row[place] < 4:
                place += 1
            middle = place
            while place < 60 and row[place] >= 4:
                place += 1
            key, value, labelled = tuple(row[start:middle]), row[middle:place], set(range(middle, place)) <= {*labels}
            assert labelled == (key in known)
            assert labelled or not set(range(middle, place)) & {*labels}
            assert known.setdefault(key, value) == value
            sizes |= {len(key), len(value)}
        assert len(known) <= 4
        assert not any(a != b and a[: len(b)] == b for a in known for b in known)
    assert sizes == {1, 2, 3}


def test_compression():
    for row, labels in sequences(Compression(words=4, size=6)):
        assert row[6] == 4
        assert row[:6] == row[7:]
        assert labels == list(range(7, 13))


def test_selective_copying():
    places = set()
    for row, labels in sequences(SelectiveCopying(words=4, length=20, size=5)):
        assert row[14] == 5
        assert [word for word in row[:14] if word < 4] == row[15:]
        assert labels == list(range(15, 20))
        places |= {place for place in range(14) if row[place] < 4}
    assert places == set(range(14))


@pytest.mark.parametrize("answers_only", [False, True])
def test_needles_are_asked_for(answers_only):
    task, told = NeedleTexts(length=700, keys=3, answers_only=answers_only), "One of the special numbers for"
    ((tokens, mask),) = draw(task, 9, 5)
    for number, (row, labels) in enumerate(zip(tokens, mask, strict=True)):
        assert row[-1] == ByteTokenizer.eod
        text = ByteTokenizer().decode(
            row[(row[:-1] == ByteTokenizer.eod).nonzero()[0][0] + 1 if 256 in row[:-1] else 0 :]
        )
        known = dict(re.findall(f"{told} (\\w+) is: (\\d+)\\.", text))
        asked = re.findall(r"\?\ The special numbers for (\w+) in the text are: (\d+)\.", text)
        assert dict(asked) == known
        assert len(known) == len(asked) == 1 + number % 3
        assert text.startswith("Some special numbers are hidden")
        answers = "".join(f" {value}." for _, value in asked)
        expected = answers if answers_only else ByteTokenizer().decode(row[1:])
        assert ByteTokenizer().decode(row[labels > 0]) == expected


def test_needles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="length: got 300, expected more than the .* tokens of 2 keys"):
        NeedleTexts(length=300, keys=2).sample(np.random.default_rng(0), 2)


def test_draws_without_replacement_have_their_probabilities():
    rng = np.random.default_rng()
    drawn = distinct(rng, np.array([1.0, 2.0, 5.0]), 20_000, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    got = [np.mean((drawn == pair).all(1)) for pair in ([2, 1], [1, 2], [0, 1])]
    assert got == pytest.approx([5 / 8 * 2 / 3, 2 / 8 * 5 / 6, 1 / 8 * 2 / 7], abs=0.02)
    assert np.sort(distinct(rng, np.ones(3), 4, 3)).tolist() == [[0, 1, 2]] * 4


def test_equal_chances_need_no_clocks(monkeypatch):
    rng = np.random.default_rng()
    drawn = distinct_uniform(rng, 5, 20_000, 3)
    assert (np.diff(np.sort(drawn, 1), axis=1) > 0).all()
    sixty, counts = np.unique(drawn @ [1, 5, 25], return_counts=True)
    assert len(sixty) == 60
    assert counts / len(drawn) == pytest.approx(1 / 60, abs=0.006)
    assert np.sort(distinct_uniform(rng, 7, 4, 7)).tolist() == [list(range(7))] * 4
    monkeypatch.setattr(choice, "distinct", None)
    assert distinct_uniform(rng, 4095, 10, 64).shape == (10, 64)


def test_a_data_set_is_read_like_any_other(tmp_path):
    task = MQAR(vocab_size=64, length=16, pairs=(2, 4))
    write(task, tmp_path / "data", 10, seed=3)
    (tokens, mask), *_ = draw(task, 10, 3)
    context = PackedContexts(tmp_path / "data", 160, seed=0, shuffle=False, vocab_size=64)[0]
    assert context.row_length == 16
    assert context.tokens(0, 160).tolist() == tokens.flatten().tolist()
    labels = context.labels(0, 160).view(10, 16)
    assert labels[:, -1].tolist() == [IGNORED] * 10
    expected = np.where(mask[:, 1:], tokens[:, 1:], IGNORED)
    assert labels[:, :-1].tolist() == expected.tolist()


def test_the_command(tmp_path):
    arguments = "--sequences 20 --held-out 5 --seed 4 compression --words 4 --size 6"
    cli.main(["synthesize", "--output", str(tmp_path / "data"), *arguments.split()])
    files = [TokenFile(tmp_path / f"data_{split}") for split in ("train", "valid")]
    assert [file.num_documents for file in files] == [20, 5]
    assert [file.num_tokens for file in files] == [260, 65]
    assert (files[0].tokens[:65] != files[1].tokens).any()


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (MQAR, {"length": 255}, "length: got 255, expected an even number"),
        (MQAR, {"pairs": (4, 65)}, "pairs: got 65, expected at most length / 4 = 64"),
        (MQAR, {"pairs": ()}, r"pairs: got \(\), expected at least one number"),
        (MQAR, {"vocab_size": 8, "pairs": (4,)}, "pairs: got 4, expected fewer than vocab_size / 2 = 4"),
        (InContextRecall, {"words": 5}, "words: got 5, expected an even number"),
        (InContextRecall, {"noise": 1.0}, r"noise: got 1\.0, expected a number in \[0, 1\)"),
        (FuzzyRecall, {"pairs": 9}, "pairs: got 9, expected at most words / 2 = 8"),
        (FuzzyRecall, {"length": 41}, "length: got 41, expected at least .* = 42"),
        (SelectiveCopying, {"size": 128}, "size: got 128, expected less than half of length=256"),
        (Compression, {"size": 0}, "size: got 0, expected at least 1"),
    ],
)
def test_tasks_that_cannot_be_are_refused(task, settings, message):
    with pytest.raises(ValueError, match=message):
        task(**settings)
