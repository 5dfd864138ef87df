"""Texts encoded word by word get the ids that the library gives, and texts that cannot be are left to it."""

import json
import random
import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lasp.data import load_tokenizer
from lasp.data.words import KNOWN, PLAIN, Words, _written_out

ENDS = [
    "'",
    "s",
    "S",
    "re",
    "LL",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x85",
    "\xa0",
    "\u3000",
    "1",
    "234",
    "ab",
    "é",
    "数",
    "!",
    "_",
]


def plain(draw, count):
    ranges = draw.choices(PLAIN, k=count)
    return [chr(draw.randint(low, high)) for low, high in ranges]


def split(expression):
    parts = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(words):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, vocab_size=400, show_progress=False
    )
    tokenizer.train_from_iterator(["the words of the text, 2024's\n\n  return über 数据 the\n"] * 3, trainer)
    return tokenizer


KINDS = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{f"split{number}": lambda e=e: trained(split(e)) for number, e in enumerate(KNOWN)},
}


def opened(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("expression", KNOWN)
def test_words_are_the_librarys(expression, run_seed):
    print(f"random inputs: --seed {run_seed}")
    draw = random.Random(run_seed)
    find = re.compile(_written_out(expression)).findall
    library = pre_tokenizers.Split(Regex(expression), "isolated")
    for _ in range(300):
        pieces = [*draw.choices(ENDS, k=20), *plain(draw, 20)]
        draw.shuffle(pieces)
        text = "".join(pieces)
        assert find(text) == [word for word, _ in library.pre_tokenize_str(text)], repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys(kind, run_seed, tmp_path):
    print(f"random inputs: --seed {run_seed}")
    draw = random.Random(run_seed)
    tokenizer = opened(KINDS[kind](), tmp_path)
    texts = [
        "",
        "the",
        *("".join([*draw.choices(ENDS, k=200), *plain(draw, 20)]) for _ in range(5)),
        "\U0001fae8 <|endoftext|>",
    ]
    assert [tokenizer._words.knows(text) for text in texts] == [True] * 7 + [False]
    both = zip(tokenizer.encode_batch(texts), tokenizer.encode_with_starts(texts), texts, strict=True)
    for ids, (same, starts), text in both:
        (whole,) = tokenizer._encode_whole_with_starts([text])
        for got, expected in ((ids, whole[0]), (same, whole[0]), (starts, whole[1])):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_many_words_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("lasp.data.words.MOST", 3)
    tokenizer = opened(KINDS["gpt2"](), tmp_path)
    text = "one two three four five one two " + "x" * 100
    np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], tokenizer.encode(text))
    assert 0 < len(tokenizer._words._ids) <= 3


def test_what_is_not_known_is_for_the_library(tmp_path):
    tokenizer = KINDS["split1"]()
    settings = json.loads(tokenizer.to_str())
    assert Words.of(tokenizer) is not None
    changes = [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": settings["model"] | {"dropout": 0.1}},
    ]
    for change in changes:
        assert Words.of(Tokenizer.from_str(json.dumps(settings | change))) is None
    assert Words.of(trained(split(r"\p{L}+|\P{L}+"))) is None

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["<tool>"])
    words = Words.of(tokenizer)
    assert [words.knows(text) for text in ("plain", "e\u0301", "a <tool> b")] == [True, False, False]
