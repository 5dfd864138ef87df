"""What lasp reads, damaged anywhere: what was written, what the damaged file says, or a ValueError that names it."""

import bz2
import gzip
import json
import lzma
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from lasp.chosen import _with_file, as_yaml
from lasp.config import TrainConfig
from lasp.data import TokenFile, TokenFileWriter, load_tokenizer
from lasp.data.conversations import encode_conversations
from lasp.data.documents import Skipped, Source
from lasp.models import Decoder, tiny
from lasp.training import checkpoint
from lasp.training.generate import generate
from lasp.training.metrics import METRICS_FILE, read_metrics
from lasp.training.optimizer import build_optimizer
from lasp.training.recipes import quickstart
from lasp.training.starts import STARTS_FILE, keep_start, last_config
from tests.fuzz.test_files import damage, damaged

TEXTS = ["one text, of a line\n", "ä second\nof two", "the third"]
WORDS = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "</s>": 4}


def texts(path: Path) -> list[str]:
    return ["".join(document.parts) for document in Source(path.name, path).documents("text", Skipped())]


def rows(path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"text": TEXTS, "number": [1, 2, 3]}), path)


def data_set(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(path), "wb") as raw, pyarrow.ipc.new_stream(raw, table.schema) as stream:
        stream.write_table(table)
    (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))


def zstd(path: Path) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as file:
        file.write("".join(TEXTS).encode())


def conversations(path: Path) -> list:
    source, byte = Source(path.name, path), load_tokenizer()
    found = ((None, each) for each in source.conversations(Skipped()))
    return [ids.tolist() for _, ids, _ in encode_conversations(byte, no_template, found, Skipped())]


def no_template():
    raise ValueError("messages: got some, expected none")


def token_file(path: Path) -> None:
    with TokenFileWriter(path.with_suffix(""), "uint16", masked=True) as writer:
        for document in ([1, 2, 3], [4, 5]):
            writer.add_document(np.array(document), np.array([0, *[1] * (len(document) - 1)]))


def documents(path: Path) -> list:
    file = TokenFile(path.with_suffix(""))
    return [file.document(number).tolist() for number in range(file.num_documents)]


def tokenizer(path: Path) -> None:
    Tokenizer(models.BPE(vocab=WORDS, merges=[("a", "b")], unk_token="<unk>")).save(str(path))
    path.with_name("tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')


def ids(path: Path) -> list[int]:
    made = load_tokenizer(path.with_name("tokenizer.json"))
    found = made.encode("ab b").tolist()
    assert made.decode(found) is not None
    return found


def metrics(path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0}, {"resumed_from": 1}, {"step": 2, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def records(path: Path) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_metrics(path.parent)


def start(path: Path) -> None:
    keep_start(config_in(path.parent), 1)


def config_in(folder: Path) -> TrainConfig:
    run = quickstart()
    return TrainConfig(model=run.model, data=run.data, run_dir=str(folder), steps=1, context_length=8)


READERS = {
    "a.txt": (lambda path: path.write_text("".join(TEXTS)), texts),
    "a.txt.gz": (lambda path: path.write_bytes(gzip.compress("".join(TEXTS).encode())), texts),
    "a.txt.bz2": (lambda path: path.write_bytes(bz2.compress("".join(TEXTS).encode())), texts),
    "a.txt.xz": (lambda path: path.write_bytes(lzma.compress("".join(TEXTS).encode())), texts),
    "a.txt.zst": (zstd, texts),
    "a.parquet": (rows, texts),
    "set/data.arrow": (data_set, lambda path: texts(path.parent)),
    "set/state.json": (lambda path: data_set(path.with_name("data.arrow")), lambda path: texts(path.parent)),
    "chats.jsonl": (
        lambda path: path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'),
        conversations,
    ),
    "data.bin": (token_file, documents),
    "data.mask": (token_file, documents),
    "tokenizer.json": (tokenizer, ids),
    "tokenizer_config.json": (lambda path: tokenizer(path.with_name("tokenizer.json")), ids),
    METRICS_FILE: (metrics, records),
    STARTS_FILE: (start, lambda path: last_config(str(path.parent))),
    "run.yaml": (
        lambda path: path.write_text(as_yaml(config_in(path.parent))),
        lambda path: _with_file(None, str(path)),
    ),
}
CHECKED = {"a.txt.gz", "a.txt.bz2", "a.txt.xz"}  # by the format
ARROW = {"a.txt.zst", "a.parquet", "set/data.arrow", "set/state.json"}
without = pytest.mark.skipif(find_spec("pyarrow") is None, reason="wants pyarrow")


@pytest.mark.parametrize("name", [pytest.param(name, marks=without if name in ARROW else ()) for name in READERS])
@given(done=damage())
def test_a_damaged_file_is_read_or_refused(name, done):
    write, read = READERS[name]
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        write(path)
        wanted = read(path)
        path.write_bytes(damaged(path.read_bytes(), done))
        try:
            found = read(path)
        except (ValueError, FileNotFoundError) as error:
            assert folder in str(error)
            return
        assert type(found) is type(wanted)
        assert name not in CHECKED or found in (wanted, [])  # nothing is left of a file that is cut to nothing


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with a checkpoint, and its text."""
    folder = tmp_path_factory.mktemp("run")
    config = config_in(folder)
    model = Decoder(replace(tiny(pattern="L"), vocab_size=257))
    config = replace(config, model=model.config, device="cpu", dtype="float32")
    torch.manual_seed(0)
    checkpoint.save(folder, 1, model, build_optimizer(model, config.optimizer), config)
    return folder, text_of(folder)


def text_of(folder: Path) -> str:
    return "".join(generate(str(folder), "a", 1, temperature=0))


@given(st.data(), damage())
def test_a_damaged_checkpoint_is_refused(saved, data, done):
    folder, text = saved
    path = folder / "checkpoints/step-00000001"
    file = data.draw(st.sampled_from([*sorted(path.iterdir()), folder / "checkpoints/latest"]))
    content = file.read_bytes()
    spoilt = damaged(content, done)
    file.write_bytes(spoilt)
    try:
        if spoilt == content or (file.name == "latest" and spoilt.decode("utf-8", "replace").strip() == path.name):
            assert text_of(folder) == text
        else:
            with pytest.raises(ValueError, match="checkpoint"):
                text_of(folder)
    finally:
        file.write_bytes(content)
