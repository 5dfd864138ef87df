"""`prepare`: which files become which documents, the same every time."""

import hashlib
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lasp.data import TokenFile, load_tokenizer
from lasp.data.prepare import prepare

TEXTS = {f"{folder}/{number}.txt": f"text {number} of {folder}, ü\r\n" for folder in "ab" for number in range(10)}
LEFT_OUT = ("a/code.c", "a/.git/x.txt", ".hidden.txt")
NO_TEXT = {"a/latin.txt": b"\xfc", "b/binary.txt": b"a\0b", "b/empty.txt": b""}


@pytest.fixture
def folder(tmp_path):
    contents = {name: text.encode() for name, text in TEXTS.items()} | dict.fromkeys(LEFT_OUT, b"not a document")
    return write(tmp_path / "corpus", contents)


def write(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def texts(prefix, tokenizer):
    file = TokenFile(prefix)
    documents = [file.document(index) for index in range(file.num_documents)]
    assert all(np.flatnonzero(document == tokenizer.eod).tolist() == [len(document) - 1] for document in documents)
    return [tokenizer.decode(document) for document in documents]


def written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_every_text_is_one_document(tmp_path, folder):
    result = prepare([folder], tmp_path / "out", valid_fraction=0.2)
    train, valid = (texts(tmp_path / f"out_{split}", load_tokenizer()) for split in ("train", "valid"))
    # The same choice on every machine: by the names' BLAKE2b hashes, not by Python's, which differ between processes.
    chosen = sorted(TEXTS, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())[:4]
    assert valid == [TEXTS[name] for name in sorted(chosen)]
    assert len(train) == 16
    assert sorted(train + valid) == sorted(TEXTS.values())
    assert result.valid is not None
    assert (result.train.documents, result.valid.documents) == (16, 4)
    assert result.train.tokens == TokenFile(tmp_path / "out_train").num_tokens
    assert result.vocab_size == 257
    # Of the hidden folder nothing is looked at, so it counts as one.
    counts = {reason: count for reason, (count, _) in result.skipped.items()}
    assert counts == {"files with the suffix .c": 1, "hidden files and folders": 2}
    assert f"skipped 1 files with the suffix .c, the first {folder / 'a/code.c'}" in str(result)
    assert f"out_valid: 4 documents, {result.valid.tokens} tokens" in str(result)


def test_files_that_are_no_text_are_skipped_and_counted(tmp_path, folder):
    write(folder, NO_TEXT)
    result = prepare([folder], tmp_path / "out", valid_fraction=0)
    assert sorted(texts(tmp_path / "out_train", load_tokenizer())) == sorted(TEXTS.values())
    assert result.skipped["files that are not UTF-8"] == (1, str(folder / "a/latin.txt"))
    assert result.skipped["files that are no text"] == (1, str(folder / "b/binary.txt"))
    assert result.skipped["empty files"] == (1, str(folder / "b/empty.txt"))
    assert f"skipped 1 empty files, the first {folder}/b/empty.txt" in str(result)


def test_the_same_again(tmp_path, folder):
    prepare([folder], tmp_path / "out")
    first = written(tmp_path)
    assert set(first) == {"out_train.bin", "out_train.idx", "out_valid.bin", "out_valid.idx"}
    prepare([folder], tmp_path / "out")
    assert written(tmp_path) == first
    elsewhere = tmp_path / "elsewhere"
    prepare([write(elsewhere / "copy", {name: text.encode() for name, text in TEXTS.items()})], elsewhere / "out")
    assert written(elsewhere) == first


def test_without_validation_files(tmp_path, folder):
    prepare([folder], tmp_path / "out")
    result = prepare([folder], tmp_path / "out", valid_fraction=0)
    assert set(written(tmp_path)) == {"out_train.bin", "out_train.idx"}  # those of the first call would overlap
    assert (result.train.documents, result.valid) == (20, None)


def test_files_and_folders(tmp_path, folder):
    """A file named outright needs no suffix, and what is named twice is one document."""
    result = prepare([folder / "a/code.c", folder / "a", folder / "a/3.txt"], tmp_path / "out", valid_fraction=0)
    assert result.train.documents == 11
    assert prepare([folder], tmp_path / "out", suffixes=(".c", ".txt")).train.documents == 20


def test_hugging_face_tokenizer(tmp_path, folder, hugging_face_file):
    path = hugging_face_file(tmp_path / "tokenizer.json")
    result = prepare([folder], tmp_path / "out", path, valid_fraction=0)
    tokenizer = load_tokenizer(path)
    assert sorted(texts(tmp_path / "out_train", tokenizer)) == sorted(TEXTS.values())
    assert result.vocab_size == tokenizer.vocab_size


def test_the_standard_library(tmp_path, monkeypatch):
    """The corpus is the library's own sources; a small stand-in for the folder keeps the test fast."""
    own = {"os.py": b"import sys", "json/decoder.py": b"import re"}
    others = (
        "test/test_os.py",
        "lib2to3/a.py",
        "site-packages/x.py",
        "unittest/test/y.py",
        "encodings/cp1.py",
        "LICENSE.txt",
    )
    library = write(tmp_path / "lib", own | dict.fromkeys(others, b"pass"))
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    prepare(["stdlib"], tmp_path / "out", valid_fraction=0)
    assert texts(tmp_path / "out_train", load_tokenizer()) == ["import re", "import sys"]


def test_the_real_standard_library(tmp_path):
    result = prepare(["stdlib"], tmp_path / "out")
    assert result.valid is not None
    assert 5e6 < result.train.tokens + result.valid.tokens < 2e7


def test_folders_are_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("lasp.data.documents.PART", 50)
    long = "x" * 120
    files = {"a/1.py": b"one\n", "a/2.py": long.encode(), "a/b/3.py": b"three", "a/4.jsonl": b'{"text": "four"}\n'}
    folder = write(tmp_path / "in", {**files, "c/5.py": b"\0", "a/6.c": b"six"})
    result = prepare([folder], tmp_path / "out", folders=True, valid_fraction=0)
    whole = [f"==> 1.py <==\none\n\n==> 2.py <==\n{long}", "==> 3.py <==\nthree"]
    assert texts(tmp_path / "out_train", load_tokenizer()) == whole
    skipped = "\n".join(result.skipped.lines())
    for reason in ("1 files of records", "1 files that are no text", "1 files with the suffix .c"):
        assert reason in skipped
    with pytest.raises(ValueError, match="folders: got True, expected False with conversations"):
        prepare([folder], tmp_path / "out", folders=True, chat=lambda: None)


def test_records_are_held_out_by_their_lines(tmp_path):
    lines = [f'{{"text": "{number}"}}\n' for number in range(40)]
    path = write(tmp_path, {"x.jsonl": "".join(lines).encode()}) / "x.jsonl"
    prepare([path], tmp_path / "out", valid_fraction=0.1)
    assert len(texts(tmp_path / "out_valid", load_tokenizer())) == 4
    assert len(texts(tmp_path / "out_train", load_tokenizer())) == 36
    # Of two files of the same name both have the line; the tie is broken, so that no split is empty.
    write(tmp_path, {"a/x.txt": b"a", "b/x.txt": b"b"})
    result = prepare([tmp_path / "a/x.txt", tmp_path / "b/x.txt"], tmp_path / "out", valid_fraction=0.5)
    assert (result.train.documents, result.valid.documents) == (1, 1)


def test_of_many_documents_about_that_part_is_held_out(tmp_path, monkeypatch):
    path = write(tmp_path, {"x.jsonl": b'{"text": "a"}\n' * 3000}) / "x.jsonl"
    exact = prepare([path], tmp_path / "exact", valid_fraction=0.1)
    monkeypatch.setattr("lasp.data.prepare.COUNTED", 2999)
    by_hash = prepare([path], tmp_path / "by_hash", valid_fraction=0.1)
    assert exact.valid.documents == 300
    assert 240 < by_hash.valid.documents < 360
    assert by_hash.train.documents + by_hash.valid.documents == 3000
    numbers = [int.from_bytes(hashlib.blake2b(f"x.jsonl:{i}".encode(), digest_size=8).digest()) for i in range(1, 3001)]
    assert by_hash.valid.documents == sum(number <= 0.1 * 2**64 for number in numbers)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lasp.data.encode.BATCH", 1 << 16)
    monkeypatch.setattr("lasp.data.documents.PART", 1 << 16)

    def peak(megabytes):
        with (tmp_path / "x.txt").open("w") as text, (tmp_path / "x.jsonl").open("w") as records:
            for number in range(megabytes * 1000):
                text.write(f"{number:9d} " * 50)
                records.write(f'{{"text": "{number:9d} {"text " * 90}"}}\n')
        tracemalloc.start()
        prepare([tmp_path / "x.txt", tmp_path / "x.jsonl"], tmp_path / "out", valid_fraction=0)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small, large = peak(1), peak(4)
    assert large < 1.2 * small


def test_an_interrupted_call_leaves_nothing_half(tmp_path, folder, monkeypatch):
    prepare([folder], tmp_path / "out")
    before = written(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lasp.data.prepare.TokenFileWriter.end_document", interrupt)
        prepare([folder / "a"], tmp_path / "out")
    assert written(tmp_path) == before
    # Files of two calls might share documents: where one has replaced only some, none is complete.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lasp.data.prepare.TokenFileWriter._commit", interrupt)
        prepare([folder / "a"], tmp_path / "out")
    assert set(written(tmp_path)) == {"out_train.bin", "out_valid.bin"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": ["nowhere"]}, FileNotFoundError, "inputs: nowhere is not there"),
        ({"inputs": []}, ValueError, r"inputs: got \[\], expected at least one file, folder or the word 'stdlib'"),
        ({"suffixes": (".java",)}, ValueError, r"got no document .*0 files with a suffix in \('.java',\)"),
        ({"suffixes": ("txt",)}, ValueError, r"suffixes: got \['txt'\]"),
        ({"valid_fraction": 1}, ValueError, "valid_fraction: got 1, expected at least 0 and below 1"),
        ({"tokenizer": "no.json"}, FileNotFoundError, "tokenizer: no.json is not there"),
    ],
)
def test_bad_arguments(tmp_path, folder, arguments, error, message):
    with pytest.raises(error, match=message):
        prepare(**{"inputs": [folder], "output_prefix": tmp_path / "out", **arguments})
    assert not written(tmp_path)


def test_one_document_cannot_be_split(tmp_path, folder):
    with pytest.raises(ValueError, match=r"got no document for .*out_train .*1 files [^;]*; valid_fraction=0\.05"):
        prepare([folder / "a/1.txt"], tmp_path / "out")
    assert not written(tmp_path)


def test_a_file_that_cannot_be_read_stops_it(tmp_path, folder, monkeypatch):
    read = Path.open

    def fail(path, *mode):
        if path.name == "5.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *mode)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(PermissionError, match=r"5\.txt"):
        prepare([folder], tmp_path / "out")
    monkeypatch.undo()
    assert not written(tmp_path)
