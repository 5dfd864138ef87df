"""Corpora in turns: each has its part, contexts are those of the corpus alone, and a stream goes on where it was."""

from fractions import Fraction

import numpy as np
import pytest

from lasp.data import Mixture, PackedContexts, TokenFileWriter
from lasp.data.mixture import whose_turn

LENGTH = 12


@pytest.fixture
def corpora(tmp_path):
    """Of 100, 200 and 300 tokens."""
    for number, name in enumerate("abc", 1):
        with TokenFileWriter(tmp_path / name, np.uint16) as writer:
            for first in range(10):
                writer.add_document(np.arange(10 * number) + 1000 * number + 100 * first)
    return [str(tmp_path / name) for name in "abc"]


def opened(corpora, *weights):
    weighted = {corpus: weight and Fraction(weight) for corpus, weight in zip(corpora, weights, strict=False)}
    return Mixture(weighted, LENGTH, seed=3)


def told(taken):
    return [(each.corpus, each.number, each.context.tokens(0, each.context.length).tolist()) for each in taken]


@pytest.mark.parametrize("weights", [("0.7", "0.3"), ("1", "2", "3"), ("0.1", "0.2", "0.7"), ("5", "1e-3"), ("1",)])
def test_each_has_its_part_of_any_first_turns(weights):
    weights = [Fraction(weight) for weight in weights]
    taken = [0] * len(weights)
    for number in range(2000):
        taken[whose_turn(number, weights)] += 1
        for turns, weight in zip(taken, weights, strict=True):
            assert abs(turns - (number + 1) * weight / sum(weights)) < len(weights)


def test_contexts_are_those_of_each_corpus_in_order(corpora):
    taken = opened(corpora, "0.5", "0.3", "0.2").take(40)
    for corpus in corpora:
        alone = PackedContexts(corpus, LENGTH, seed=3)
        own = [each for each in taken if each.corpus == corpus]
        assert [each.number for each in own] == list(range(len(own)))
        assert told(own) == [(corpus, i, alone[i].tokens(0, LENGTH).tolist()) for i in range(len(own))]
    assert [sum(each.corpus == corpus for each in taken) for corpus in corpora] == [20, 12, 8]


def test_without_weights_all_tokens_count_the_same(corpora):
    taken = opened(corpora, None, None, None).take(600)
    assert [sum(each.corpus == corpus for each in taken) for corpus in corpora] == [100, 200, 300]


def test_contexts_of_each_corpus_are_shuffled(corpora):
    weights = {corpora[0]: Fraction(1), corpora[1]: Fraction(2)}
    taken = Mixture(weights, LENGTH, seed=3, shuffle_contexts=True).take(30)
    for corpus in corpora[:2]:
        alone = PackedContexts(corpus, LENGTH, seed=3)
        own = [each.context.tokens(0, LENGTH).tolist() for each in taken if each.corpus == corpus]
        assert own == [alone.shuffled(i, LENGTH).tokens(0, LENGTH).tolist() for i in range(len(own))]


def test_one_corpus_is_its_own_contexts(corpora):
    taken = opened(corpora, None).take(5)
    alone = PackedContexts(corpora[0], LENGTH, seed=3)
    assert told(taken) == [(None, i, alone[i].tokens(0, LENGTH).tolist()) for i in range(5)]


def test_shorter_contexts_are_the_parts_of_longer_ones(corpora):
    whole, short = opened(corpora, "2", "1").take(6), opened(corpora, "2", "1").take(6, 4)
    for number, each in enumerate(short):
        (corpus, index, tokens), part = told([whole[number // 3]])[0], number % 3
        assert told([each]) == [(corpus, 3 * index + part, tokens[4 * part : 4 * part + 4])]


def test_it_goes_on_where_it_was(corpora):
    expected = told(opened(corpora, "0.6", "0.4").take(50))
    for stop in (0, 1, 7, 30):
        before = opened(corpora, "0.6", "0.4")
        before.take(stop)
        after = opened(corpora, "0.6", "0.4")
        after.go_on(before.tokens, before.positions)
        assert told(after.take(50 - stop)) == expected[stop:]


def test_it_goes_on_with_other_weights_and_corpora(corpora):
    before = opened(corpora, "1", "1")
    before.take(20)
    other = Mixture({corpora[1]: Fraction(1), corpora[2]: Fraction(3)}, LENGTH, seed=3)
    other.go_on(before.tokens, before.positions)
    taken = other.take(8)
    assert [each.number for each in taken if each.corpus == corpora[1]] == [10, 11]
    assert [each.number for each in taken if each.corpus == corpora[2]] == list(range(6))
    assert other.tokens == 28 * LENGTH
    alone = opened(corpora[2:], None)  # in the place of one other, it goes on
    alone.go_on(5 * LENGTH, {"another": 5 * LENGTH})
    assert [each.number for each in alone.take(2)] == [5, 6]


def test_streams_are_told_apart(corpora):
    prints = {opened(corpora, *weights).fingerprint for weights in (("1", "1"), ("1", "2"), ("2", "2"), (None,))}
    assert len(prints) == 3
    copy = f"{corpora[0]}_copy"
    for ending in (".bin", ".idx"):
        with open(corpora[0] + ending, "rb") as source, open(copy + ending, "wb") as target:
            target.write(source.read())
    with pytest.raises(ValueError, match="expected no corpus twice, under whatever name"):
        opened([corpora[0], copy], "1", "1")
