"""The byte tokenizer and Hugging Face files: what goes in comes out, and what is missing is named."""

import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from lasp import cli
from lasp.data import TokenFile, load_tokenizer

TEXT = "def f(x):\n    return 'Größe 数 🙂'\n"


def test_bytes_round_trip():
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(TEXT)
    assert ids.tolist() == list(TEXT.encode())
    np.testing.assert_array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, tokenizer.eod]) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.decode(np.frombuffer("数".encode()[:2], dtype=np.uint8)) == "\ufffd"


def test_hugging_face_round_trip(tmp_path, hugging_face_file):
    tokenizer = load_tokenizer(hugging_face_file(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert 4 < len(ids) < len(TEXT.encode())  # not truncated, and pairs were merged
    assert tokenizer.decode(ids) == tokenizer.decode([*ids, tokenizer.eod]) == TEXT
    np.testing.assert_array_equal(ids, tokenizer.encode(TEXT.encode()))
    assert tokenizer.eod == 0
    assert ids.max() < tokenizer.vocab_size
    assert load_tokenizer(tmp_path).vocab_size == tokenizer.vocab_size  # the folder of the file


def test_the_name_of_a_special_token_inside_a_text_is_text(tmp_path, hugging_face_file):
    tokenizer = load_tokenizer(hugging_face_file(tmp_path / "tokenizer.json"))
    text = "if token == '<|endoftext|>':"
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text


def test_end_of_document_by_name(tmp_path, hugging_face_file):
    path = hugging_face_file(tmp_path / "odd.json", eod="<stop>")
    assert load_tokenizer(path, eod="<stop>").eod == 0
    with pytest.raises(ValueError, match=r"eod: got None.*odd\.json"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match=r"eod: got '<end>'.*odd\.json"):
        load_tokenizer(path, eod="<end>")
    with pytest.raises(ValueError, match="eod: got '<end>'"):
        load_tokenizer("byte", eod="<end>")


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is not there; expected 'byte' or .* tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is not there"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json, expected a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")


@pytest.mark.parametrize("ids", [[257], [-1]])
def test_ids_out_of_range(ids):
    with pytest.raises(ValueError, match=rf"ids: got values from {ids[0]} .*expected 0 to 256"):
        load_tokenizer("byte").decode(ids)


def test_the_end_that_its_configuration_names(tmp_path, hugging_face_file):
    path = hugging_face_file(tmp_path / "tokenizer.json", eod="<stop>")
    for named in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(path).eod == load_tokenizer(tmp_path).eod == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<other>"}))
    with pytest.raises(ValueError, match="none of .*'<other>'.* is one"):
        load_tokenizer(path)


def test_what_only_transformers_reads_becomes_a_file(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    source, prefix = tmp_path / "gpt2", tmp_path / "data" / "texts"
    source.mkdir()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *sorted(alphabet), "ab"])}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "text.txt").write_text("abc abba")
    cli.main(
        [
            "prepare",
            str(tmp_path / "text.txt"),
            "--output",
            str(prefix),
            "--tokenizer",
            str(source),
            "--valid-fraction",
            "0",
        ]
    )
    tokenizer = load_tokenizer(f"{prefix}_tokenizer")
    np.testing.assert_array_equal(TokenFile(f"{prefix}_train").tokens, [*tokenizer.encode("abc abba"), 0])
    assert vocabulary["ab"] in tokenizer.encode("abc")

    def refuse(name):
        raise OSError(f"{name} is no model\nand more")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(
        ValueError, match=r"tokenizer: got 'no/such' \(no/such is no model\), expected 'byte', the path"
    ):
        cli.main(["prepare", str(tmp_path / "text.txt"), "--output", str(prefix), "--tokenizer", "no/such"])
