"""Files become documents; however large they are, a part of one is read at a time.

    .jsonl .ndjson .json            a document in each line: the text field of a JSON object, or a conversation
    .parquet, a saved data set      a document in each row (lasp.data.tables)
    any other                       one document, in UTF-8

Text and lines may be compressed (lasp.data.compressed).
"""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasp.config import require
from lasp.data.compressed import BUFFER, format_suffix, open_bytes
from lasp.data.tables import Fields, read_data_set, read_parquet

PART = 1 << 19  # characters
CONVERSATION = Fields(
    (("messages",), ("prompt", "completion")), "the field messages, or prompt and completion (--chat)", ("tools",)
)


@dataclass(frozen=True)
class Document:
    """A text in parts of PART characters, the last one shorter; its name does not depend on the machine."""

    name: str
    parts: Iterator[str]


@dataclass(frozen=True)
class Conversation:
    """A record with messages, or a prompt and its completion (lasp.data.conversations), and where it stands."""

    name: str
    where: str
    record: dict[str, Any]


class Skipped(dict[str, tuple[int, str]]):
    """What was left out: for each reason how many there were, and the first."""

    def add(self, reason: str, name: object) -> None:
        count, first = self.get(reason, (0, str(name)))
        self[reason] = count + 1, first

    def lines(self) -> list[str]:
        return [f"skipped {count:,} {reason}, the first {first}" for reason, (count, first) in self.items()]


@dataclass(frozen=True)
class Source:
    """A file, or the folder of a data set, and its name within the input."""

    name: str
    path: Path

    @property
    def records(self) -> "Callable[[Path, Fields], Iterator[tuple[int, dict[str, Any]]]] | None":
        """What reads its records as (number, the fields' values); None if it is one text."""
        return read_data_set if self.path.is_dir() else RECORDS.get(format_suffix(self.path))

    def documents(self, text_field: str, skipped: Skipped) -> Iterator[Document]:
        """Raises ValueError naming the file, and the line or row, for what is not a record with a text."""
        if self.records is None:
            if (problem := why_no_text(self.path)) is None:
                yield Document(self.name, _text(self.path))
            else:
                skipped.add(problem, self.path)
            return
        for number, record in self.records(
            self.path, Fields(((text_field,),), f"the field {text_field!r} (--text-field)")
        ):
            if text := _checked(record[text_field], f"{self.path}:{number}", text_field):
                yield Document(f"{self.name}:{number}", (text[i : i + PART] for i in range(0, len(text), PART)))
            else:
                skipped.add("records with an empty text", f"{self.path}:{number}")

    def conversations(self, skipped: Skipped) -> Iterator[Conversation]:
        """Likewise, of records with messages, or with a prompt and a completion."""
        if self.records is None:
            skipped.add("files that hold no records", self.path)
            return
        for number, record in self.records(self.path, CONVERSATION):
            yield Conversation(f"{self.name}:{number}", f"{self.path}:{number}", record)


@dataclass(frozen=True)
class Folder:
    """The texts of a folder, without those of folders in it, as one document; each begins with its file's name."""

    name: str
    files: tuple[Source, ...]
    records = None

    @property
    def path(self) -> Path:
        return self.files[0].path.parent

    def documents(self, text_field: str, skipped: Skipped) -> Iterator[Document]:
        texts = []
        for file in self.files:
            if (problem := "files of records" if file.records else why_no_text(file.path)) is None:
                texts.append(file)
            else:
                skipped.add(problem, file.path)
        if texts:
            yield Document(self.name, _in_parts(self._parts(texts)))

    def _parts(self, texts: list[Source]) -> Iterator[str]:
        for number, file in enumerate(texts):
            yield f"{chr(10) if number else ''}==> {file.path.name} <==\n"
            yield from _text(file.path)


def by_folder(sources: list[Source]) -> list[Folder]:
    """The folders that the files are in, in their order."""
    files: dict[Path, list[Source]] = {}
    for source in sources:
        files.setdefault(source.path.parent, []).append(source)
    return [Folder(str(Path(some[0].name).parent), tuple(some)) for some in files.values()]


def _in_parts(texts: Iterator[str]) -> Iterator[str]:
    """The same text in parts of PART characters, the last one shorter."""
    held = ""
    for text in texts:
        held += text
        while len(held) > PART:
            yield held[:PART]
            held = held[PART:]
    yield held


def why_no_text(path: Path) -> str | None:
    """What a file is, in the plural, if it is not a text."""
    decoder, empty = codecs.getincrementaldecoder("utf-8")(), True
    try:
        with open_bytes(path) as file:
            while block := file.read(BUFFER):
                empty = False
                if b"\0" in block:
                    return "files that are no text"
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "files that are not UTF-8"
    return "empty files" if empty else None


def _text(path: Path) -> Iterator[str]:
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        while part := text.read(PART):
            yield part


def _lines(path: Path, fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            where, expected = f"{path}:{number}", "a JSON object in each line"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: got {line[:80]!r}, expected {expected} ({error})") from error
            require(isinstance(record, dict), where, line[:80], expected)
            yield number, {name: record[name] for name in fields.among(record, where)}


def _checked(value: object, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: got {text_field}={str(value)[:80]}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: got {error}, expected Unicode text in {text_field}") from error
    return value


RECORDS = {".jsonl": _lines, ".ndjson": _lines, ".json": _lines, ".parquet": read_parquet}
