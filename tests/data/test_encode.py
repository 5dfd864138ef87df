"""Texts in parts get the ids of the whole text, whatever the tokenizer and wherever the parts end."""

import base64
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from lasp.data import encode, load_tokenizer
from lasp.data.encode import encode_all

SPECIAL = ["<|endoftext|>", "<unk>"]
WORDS = ["def", "return", "self", "Größe", "数据集", "の", "x", "(", ")", ":", "\n", "    ", "0.5", "🙂🇩🇪", "é"]


def trained(model, words, trainer, **settings):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = words
    corpus = [" ".join(random.Random(0).choices(WORDS, k=300)), "aababab" * 3 + "  " * 8 + "==" * 8]
    tokenizer.train_from_iterator(corpus, trainer(special_tokens=SPECIAL, show_progress=False, **settings))
    return tokenizer


def byte_level():
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), words, trainers.BpeTrainer, initial_alphabet=words.alphabet(), vocab_size=400)


def unigram():
    pieces = [
        *WORDS,
        "▁",
        "▁a",
        "▁ab",
        "▁def",
        *"abcdefghijklmnopqrstuvwxyz0123456789",
        "aa",
        "00",
        "==",
        "ab",
        "abab",
        "aba",
    ]
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", -20.0), ("<|endoftext|>", 0.0), *((p, -3.0) for p in pieces)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_pieces():
    words = pre_tokenizers.BertPreTokenizer()
    return trained(models.WordPiece(unk_token="<unk>"), words, trainers.WordPieceTrainer, vocab_size=200)


def without_words():
    """Like SentencePiece's BPE: the text is one word, whose beginning gets a space."""
    tokenizer = trained(models.BPE(unk_token="<unk>"), pre_tokenizers.Metaspace(), trainers.BpeTrainer, vocab_size=200)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}))


@pytest.fixture(params=[None, byte_level, unigram, word_pieces, without_words], ids=lambda kind: kind and kind.__name__)
def tokenizer(request, tmp_path):
    if request.param is None:
        return load_tokenizer("byte")
    request.param().save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def text(draw, pieces):
    def piece():
        kind = draw.randrange(40)
        if kind == 0:
            return draw.choice([" ", "\n", "=", "0", "ab"]) * draw.randrange(1, 5000)
        if kind == 1:
            return base64.b64encode(draw.randbytes(draw.randrange(3000))).decode()
        return " ".join(draw.choices(WORDS, k=draw.randrange(100)))

    return "".join(piece() for _ in range(pieces))


def encoded(tokenizer, texts, length):
    got = [[] for _ in texts]
    parts = ((number, (t[i : i + length] for i in range(0, len(t), length))) for number, t in enumerate(texts))
    for number, ids, last in encode_all(tokenizer, parts):
        assert not any(done for ends in got[number + 1 :] for _, done in ends), "in their order"
        got[number].append((ids, last))
    for pieces in got:
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    return [np.concatenate([ids for ids, _ in pieces]) for pieces in got]


def test_the_ids_of_the_whole(tokenizer, run_seed, monkeypatch):
    print(f"random inputs: --seed {run_seed}")
    monkeypatch.setattr(encode, "BATCH", 20_000)
    draw = random.Random(run_seed)
    texts = ["", "a", text(draw, 200), "", text(draw, 3), text(draw, 100)]
    for length in (draw.randrange(2049, 3000), 10_000):
        for got, whole in zip(encoded(tokenizer, texts, length), texts, strict=True):
            np.testing.assert_array_equal(got, tokenizer.encode(whole))


@pytest.mark.parametrize("repeated", ["ab", "aba", "a", "=", " "])
def test_a_long_run_of_the_same(tokenizer, repeated):
    """Where tokens begin in it may depend on where it ends, and parts of it can agree on what is not so."""
    for length in range(9000, 9007):
        whole = "def " + repeated * (length // len(repeated)) + " return"
        (got,) = encoded(tokenizer, [whole], 2049)
        np.testing.assert_array_equal(got, tokenizer.encode(whole))


def test_parts_that_do_not_agree_are_encoded_together(tokenizer, monkeypatch):
    whole = text(random.Random(0), 200)
    monkeypatch.setattr(encode.Encoded, "agrees", disagree_at_first(encode.Encoded.agrees))
    (got,) = encoded(tokenizer, [whole], 3000)
    np.testing.assert_array_equal(got, tokenizer.encode(whole))


def disagree_at_first(agrees):
    """Every other pair of parts does not; a part and that part with more text do."""
    asked = []

    def changed(self, other, begin, end):
        if self.window.start == other.window.start:
            return agrees(self, other, begin, end)
        asked.append(begin)
        return len(asked) % 2 == 0 and agrees(self, other, begin, end)

    return changed


def test_a_tokenizer_that_looks_far_ahead_is_refused(tmp_path, hugging_face_file):
    class Odd:
        """Its tokens are longer if the whole text is."""

        overlap = 16

        def encode_with_starts(self, texts):
            return [self._one(len(text)) for text in texts]

        def _one(self, length):
            starts = np.arange(0, length, 1 + length % 7)
            return starts, starts

    with pytest.raises(ValueError, match="tokenizer: got 'tokens that depend on what is far away'"):
        encoded(Odd(), ["".join(map(str, range(1000)))], 100)
