"""What `prepare` reads: every format gives the same documents, and what is damaged or unknown is refused by name."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from lasp.data import TokenFile, documents, load_tokenizer
from lasp.data.prepare import prepare

TEXTS = ["one", "two\r\nlines, ü", "", 'th"ree 🙂', "a longer text " * 20]
KEPT = [text for text in TEXTS if text]
COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def records(field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts(tmp_path, *inputs, **settings):
    prepare(inputs, tmp_path / "out", **{"valid_fraction": 0, **settings})
    file = TokenFile(tmp_path / "out_train")
    return [load_tokenizer().decode(file.document(i)) for i in range(file.num_documents)]


def nothing_written(folder):
    return not [path.name for path in folder.iterdir() if path.name.startswith("out")]


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow")


@pytest.fixture
def table(arrow):
    return arrow.table({"id": range(len(TEXTS)), "text": TEXTS})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So that a document has several; not so small that parts of records and of lines would be the same."""
    monkeypatch.setattr(documents, "PART", 7)


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json"])
def test_json_lines(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + records().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert texts(tmp_path, path) == KEPT
    result = prepare([path], tmp_path / "out", valid_fraction=0)
    assert result.skipped == {"records with an empty text": (1, f"{path}:3")}


def test_the_field_of_the_text(tmp_path):
    path = write(tmp_path / "x.jsonl", records("content"))
    assert texts(tmp_path, path, text_field="content") == KEPT


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed(tmp_path, ending):
    compress = COMPRESSORS[ending]
    write(tmp_path / f"in/a.jsonl{ending}", compress(records()[:60]) + compress(records()[60:]))  # of two members
    write(tmp_path / f"in/b.txt{ending}", compress(TEXTS[1].encode()))
    assert texts(tmp_path, tmp_path / "in") == [*KEPT, TEXTS[1]]


def test_zstandard(tmp_path, arrow):
    def compress(content):
        return arrow.compress(content, "zstd", asbytes=True)

    write(tmp_path / "in/a.jsonl.zst", compress(records()[:60]) + compress(records()[60:]))
    assert texts(tmp_path, tmp_path / "in") == KEPT


def test_parquet(tmp_path, table):
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    parquet.write_table(table, tmp_path / "in/x.parquet", row_group_size=2)
    assert texts(tmp_path, tmp_path / "in") == KEPT
    with pytest.raises(
        ValueError, match=r"x.parquet: got \['id', 'text'\], expected the field 'body' \(--text-field\)"
    ):
        texts(tmp_path, tmp_path / "in", text_field="body")


def save_to_disk(folder, arrow, table):
    """As the library `datasets` does."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        write(folder / name, b"")
        with arrow.ipc.new_stream(str(folder / name), part.schema) as stream:
            stream.write_table(part)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}).encode())
    write(folder / "dataset_info.json", b"{}")


def test_a_data_set_saved_to_disk(tmp_path, arrow, table):
    save_to_disk(tmp_path / "set", arrow, table)
    assert texts(tmp_path, tmp_path / "set") == KEPT


def test_a_data_set_of_splits_is_refused(tmp_path, arrow, table):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "set" / split, arrow, table)
    write(tmp_path / "set/dataset_dict.json", b"{}")
    with pytest.raises(ValueError, match=r"inputs: got .*set, a data set of several splits, .*: test, train"):
        texts(tmp_path, tmp_path / "set")
    assert texts(tmp_path, tmp_path / "set/train") == KEPT


def test_the_library_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).select([4, 1, 0]).save_to_disk(tmp_path / "set")
    assert texts(tmp_path, tmp_path / "set") == [TEXTS[4], TEXTS[1], TEXTS[0]]


def test_pyarrow_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("x.parquet", "x.jsonl.zst"):
        with pytest.raises(ValueError, match=f"{name}: got no pyarrow .*pip install 'lasp-sp\\[data\\]'"):
            texts(tmp_path, write(tmp_path / name, b"PAR1"))


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\n", r"x.jsonl:3: got b'\\n', expected a JSON object in each line"),
        ('{"text": "cut', r"x.jsonl:3: got b'{\"text\": \"cut', expected a JSON object"),
        ('["text"]\n', r"x.jsonl:3: got b'\[\"text\"\]\\n', expected a JSON object"),
        ('{"txt": "a"}\n', r"x.jsonl:3: got \['txt'\], expected the field 'text' \(--text-field\)"),
        ('{"text": null}\n', r"x.jsonl:3: got text=None, expected a text"),
        ('{"text": 7}\n', r"x.jsonl:3: got text=7, expected a text"),
        ('{"text": "\\ud800"}\n', r"x.jsonl:3: got .*surrogates not allowed, expected Unicode text"),
        ("\xff\n", r"x.jsonl:3: got b'\\xff\\n', expected a JSON object"),
        ("[" * 100_000, r"x.jsonl:3: got .*expected a JSON object"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    path = write(tmp_path / "x.jsonl", (GOOD * 2 + line).encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        texts(tmp_path, path)
    assert nothing_written(tmp_path)


def test_the_first_record_of_every_file_is_looked_at_before_any_is_tokenised(tmp_path, monkeypatch):
    write(tmp_path / "in/a.jsonl", GOOD.encode() * 100)
    write(tmp_path / "in/b.jsonl", b'{"body": "x"}\n')
    monkeypatch.setattr("lasp.data.prepare.encode_all", lambda *_: pytest.fail("tokenised"))
    with pytest.raises(ValueError, match=r"b.jsonl:1: got \['body'\]"):
        texts(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: b"no such file"], ids=["cut", "other"]
)
def test_damaged_compressed_files_are_named(tmp_path, ending, damage):
    path = write(tmp_path / f"x.jsonl{ending}", damage(COMPRESSORS[ending](GOOD.encode() * 1000)))
    with pytest.raises(ValueError, match=f"x.jsonl{ending}: got .*, expected it whole and readable"):
        texts(tmp_path, path)
    assert nothing_written(tmp_path)


def test_damaged_tables_are_named(tmp_path, arrow, table):
    for name in ("x.parquet", "x.jsonl.zst"):
        with pytest.raises(ValueError, match=f"{name}: got .*, expected it whole and readable"):
            texts(tmp_path, write(tmp_path / name, b"no such file" * 10))
    save_to_disk(tmp_path / "set", arrow, table)
    write(tmp_path / "set/data-00001-of-00002.arrow", b"no such file" * 10)
    with pytest.raises(ValueError, match="set: got .*, expected it whole and readable"):
        texts(tmp_path, tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"a\0b", "x.bin', expected a text; it is one of the files that are no text"),
        ("x.txt", b"\xff", "x.txt', expected a text; it is one of the files that are not UTF-8"),
        ("x.csv", b"a,b\n", "x.csv', expected JSON Lines or parquet"),
        ("x.tsv.gz", gzip.compress(b"a\tb\n", mtime=0), "x.tsv.gz', expected JSON Lines or parquet"),
    ],
    ids=["no text", "no UTF-8", "a table", "a compressed table"],
)
def test_what_is_named_outright_and_unknown_is_refused(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"inputs: got '.*{message}"):
        texts(tmp_path, write(tmp_path / name, content))
    assert nothing_written(tmp_path)


def test_links_are_followed_and_may_form_a_circle(tmp_path):
    write(tmp_path / "elsewhere/deep/b.txt", b"b")
    write(tmp_path / "in/a.txt", b"a")
    (tmp_path / "in/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (tmp_path / "in/file.txt").symlink_to(tmp_path / "elsewhere/deep/b.txt")
    (tmp_path / "in/lost.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in/pipe.txt")
    assert sorted(texts(tmp_path, tmp_path / "in")) == ["a", "b"]
    skipped = prepare([tmp_path / "in"], tmp_path / "out", valid_fraction=0).skipped
    assert skipped == {
        "links to nowhere": (1, str(tmp_path / "in/lost.txt")),
        "that are no regular files": (1, str(tmp_path / "in/pipe.txt")),
    }


def test_a_folder_that_cannot_be_read_stops_it(tmp_path, monkeypatch):
    write(tmp_path / "in/closed/a.txt", b"a")
    write(tmp_path / "in/b.txt", b"b")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        texts(tmp_path, tmp_path / "in")
