"""Tokenizers of one's own."""

import pytest

from lasp import cli
from lasp.data import load_tokenizer
from lasp.data.bpe import train_tokenizer

TEXT = "def double(number):\n    return 2 * number  # twice the number, über 1234\n\n\n" * 20


def test_any_text_comes_back(tmp_path):
    train_tokenizer(iter([TEXT]), tmp_path / "tokenizer.json", 285)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod) == (285, 0)
    for text in (TEXT, "日本語, \t\r\n \0 never seen <|endoftext|>", " ", "1234567"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2
    assert len(tokenizer.encode("1234567")) == 7  # digits stay single
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2 number")] == ["2", " number"]


def test_the_command_reads_what_prepare_reads(tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.py").write_text(TEXT if number == 3 else "")
    (tmp_path / "lines.jsonl").write_text('{"body": "' + 500 * " spam" + '"}\n')
    output = tmp_path / "new" / "tokenizer.json"
    inputs = [str(tmp_path / "3.py"), str(tmp_path / "lines.jsonl")]
    with pytest.raises(ValueError, match="expected the field 'text'"):
        cli.main(["tokenizer", *inputs, "--output", str(output), "--vocab-size", "270"])
    assert not output.exists()
    cli.main(["tokenizer", *inputs, "--output", str(output), "--vocab-size", "270", "--text-field", "body"])
    assert capsys.readouterr().out == f"{output}: 270 tokens\n"
    assert len(load_tokenizer(output).encode(" spam")) == 1
    cli.main(["tokenizer", str(tmp_path), "--output", str(output), "--vocab-size", "270", "--suffixes", ".py"])
    assert len(load_tokenizer(output).encode(" spam")) > 1


def test_of_long_texts_a_part_is_read(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("".join(f"word{chr(97 + n % 26)} " for n in range(80_000)))
    output = str(tmp_path / "tokenizer.json")
    cli.main(["tokenizer", str(tmp_path), "--output", output, "--vocab-size", "270", "--characters", "200000"])
    assert "270 tokens, from one in 3 parts of 1 files" in capsys.readouterr().out


def test_sizes_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: got 256, expected more than 256: the bytes"):
        train_tokenizer(iter([TEXT]), tmp_path / "tokenizer.json", 256)
    with pytest.raises(ValueError, match="vocab_size: got 5000, expected at most"):
        train_tokenizer(iter(["some words"]), tmp_path / "tokenizer.json", 5000)
    assert not list(tmp_path.iterdir())
