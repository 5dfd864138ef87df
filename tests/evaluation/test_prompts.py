"""Needles, tracked variables and counted words: what stands in the prompts, where, and how answers are scored."""

import re
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lasp.data import load_tokenizer
from lasp.evaluation.prompts.counting import CommonWords, FrequentWords
from lasp.evaluation.prompts.needles import Needles
from lasp.evaluation.prompts.prompt import NOISE, Composer, Haystack, read_haystack
from lasp.evaluation.prompts.tracking import Tracking
from lasp.evaluation.prompts.words import WORDS
from lasp.evaluation.ruler import RULER_TASKS

TOLD = re.compile(r"One of the special (\w+) for (\S+) is: (\S+?)\.(?= |\n)")


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture(params=["byte", "json"])
def tokenizer(request, tmp_path, hugging_face_file):
    return load_tokenizer("byte" if request.param == "byte" else hugging_face_file(tmp_path / "tokenizer.json"))


@pytest.fixture
def hugging_face_file():
    """Writes a byte-level BPE tokenizer.json with two merges."""

    def write(path):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: number for number, letter in enumerate([*letters, "Ġt", "Ġth", "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("Ġt", "h")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(path))
        return path

    return write


@pytest.mark.parametrize("name", RULER_TASKS)
def test_every_task_fits_its_length_with_any_tokenizer(tokenizer, rng, name):
    composer, haystack = Composer(tokenizer), read_haystack(None)
    prompt = RULER_TASKS[name].prompt(composer, haystack, 6000, rng)
    assert prompt.ids.dtype == np.int64
    assert 5000 < len(prompt.ids) + prompt.room <= 6000
    text = tokenizer.decode(prompt.ids)
    told = text[: text.rindex("?")]
    assert all(answer in told for answer in prompt.answers)
    assert prompt.score(", ".join(prompt.answers).upper()) == 1
    assert prompt.score("nothing") == 0
    assert tokenizer.decode(prompt.expected).strip() == ", ".join(prompt.answers)
    seed = int(rng.integers(2**32))
    same = [RULER_TASKS[name].prompt(composer, haystack, 5900, np.random.default_rng(seed)).ids for _ in range(2)]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (5, 1), (1, 4)])
def test_a_needle_lies_at_its_depth(rng, depth, keys, values):
    tokenizer = load_tokenizer()
    prompt = Needles(keys=keys, values=values).prompt(Composer(tokenizer), read_haystack(None), 6000, rng, depth)
    text = tokenizer.decode(prompt.ids)
    told = [(match[1], match[2], match[3]) for match in TOLD.finditer(text)]
    assert len(told) == keys * values
    question = text[text.rindex("\n") :]
    assert f"What are the special numbers for {told[0][1]}" in question or keys > 1
    assert {value for _, key, value in told if key in question} == set(prompt.answers)
    assert text.index(f"is: {prompt.answers[0]}.") / len(text) == pytest.approx(depth, abs=0.1)


def test_all_values_of_the_keys_asked_for_are_the_answers(rng):
    tokenizer = load_tokenizer()
    prompt = Needles(keys=4, values=2, queries=3).prompt(Composer(tokenizer), read_haystack(None), 4000, rng)
    text = tokenizer.decode(prompt.ids)
    known = {}
    for match in TOLD.finditer(text):
        known.setdefault(match[2], set()).add(match[3])
    asked = re.search(r"numbers for (\w+), (\w+) and (\w+) in the text\?", text).groups()
    assert len(known) == 4
    assert set(prompt.answers) == set().union(*(known[key] for key in asked))


def test_needles_among_needles(rng):
    tokenizer = load_tokenizer()
    task = RULER_TASKS["niah_multikey_3"]
    text = tokenizer.decode(task.prompt(Composer(tokenizer), read_haystack(None), 8000, rng).ids)
    keys = [match[2] for match in TOLD.finditer(text)]
    assert len(keys) == len(set(keys)) > 50


def test_variables_are_assigned_in_order(rng):
    tokenizer = load_tokenizer()
    prompt = Tracking(hops=3).prompt(Composer(tokenizer), read_haystack(None), 3000, rng)
    text = tokenizer.decode(prompt.ids)
    lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert [name for name, _ in lines] == list(prompt.answers)
    assert lines[0][1].isdigit()
    assert [source for _, source in lines[1:]] == list(prompt.answers[:-1])
    assert f"value {lines[0][1]}" in text[text.rindex("\n") :]
    assert NOISE[:30] in text


def test_common_words_are_the_common_ones(rng):
    tokenizer = load_tokenizer()
    prompt = CommonWords(common=4, often=6, seldom=2).prompt(Composer(tokenizer), read_haystack(None), 2000, rng)
    body = tokenizer.decode(prompt.ids).split("\n")[1]
    counts = Counter(re.findall(r"\d+\. (\w+)", body))
    assert {word for word, count in counts.items() if count == 6} == set(prompt.answers)
    assert set(counts.values()) == {6, 2}
    assert len(prompt.answers) == 4


def test_frequent_words_follow_their_law(rng):
    tokenizer = load_tokenizer()
    prompt = FrequentWords().prompt(Composer(tokenizer), read_haystack(None), 6000, rng)
    words = tokenizer.decode(prompt.ids).split("\n")[1].split()
    ranked = Counter(words).most_common()
    assert ranked[0][0] == "...."
    assert [word for word, _ in ranked[1:4]] == list(prompt.answers)
    assert [count / ranked[0][1] for _, count in ranked[1:4]] == pytest.approx([1 / 4, 1 / 9, 1 / 16], abs=0.01)


@pytest.mark.parametrize("kind", WORDS)
def test_words_are_different(rng, kind):
    words = WORDS[kind](rng, 2000)
    assert len(set(words)) == 2000
    assert len({len(word) for word in words}) == 1


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_length_that_is_too_short_is_refused(rng, name):
    with pytest.raises(ValueError, match=r"lengths: got .*, expected (more than the \d+ tokens|room for)"):
        RULER_TASKS[name].prompt(Composer(load_tokenizer()), read_haystack(None), 100, rng)


def test_a_tokenizer_that_loses_characters_is_refused(tmp_path, rng):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "[EOS]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer: got .* expected one whose tokens give a text back"):
        Needles().prompt(Composer(load_tokenizer(tmp_path / "tokenizer.json")), read_haystack(None), 1000, rng)


def test_haystacks(tmp_path):
    (tmp_path / "x.txt").write_text("One.  Two?\nThree three! ")
    assert read_haystack(str(tmp_path / "x.txt")).sentences == [" One.", " Two?", " Three three!"]
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"haystack: got .*x\.txt"):
        read_haystack(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match="haystack: got '', expected a text with sentences"):
        Haystack("")
