"""Files become documents; however large they are, a part of one is read at a time.

    .jsonl .ndjson .json            a document in each line: the text field of a JSON object
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

from lasp.config import require
from lasp.data.compressed import BUFFER, format_suffix, open_bytes
from lasp.data.tables import read_data_set, read_parquet

PART = 1 << 16  # characters


@dataclass(frozen=True)
class Document:
    """A text in parts of PART characters, the last one shorter; its name does not depend on the machine."""

    name: str
    parts: Iterator[str]


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
    def records(self) -> "Callable[[Path, str], Iterator[tuple[int, object]]] | None":
        """What reads its records as (number, value of the field); None if it is one text."""
        return read_data_set if self.path.is_dir() else RECORDS.get(format_suffix(self.path))

    def documents(self, text_field: str, skipped: Skipped) -> Iterator[Document]:
        """Raises ValueError naming the file, and the line or row, for what is not a record with a text."""
        if self.records is None:
            if (problem := why_no_text(self.path)) is None:
                yield Document(self.name, _text(self.path))
            else:
                skipped.add(problem, self.path)
            return
        for number, value in self.records(self.path, text_field):
            if text := _checked(value, f"{self.path}:{number}", text_field):
                yield Document(f"{self.name}:{number}", (text[i : i + PART] for i in range(0, len(text), PART)))
            else:
                skipped.add("records with an empty text", f"{self.path}:{number}")


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


def _lines(path: Path, text_field: str) -> Iterator[tuple[int, object]]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            where, expected = f"{path}:{number}", "a JSON object in each line"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: got {line[:80]!r}, expected {expected} ({error})") from error
            require(isinstance(record, dict), where, line[:80], expected)
            require(text_field in record, where, sorted(record), f"the field {text_field!r} (--text-field)")
            yield number, record[text_field]


def _checked(value: object, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: got {text_field}={str(value)[:80]}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: got {error}, expected Unicode text in {text_field}") from error
    return value


RECORDS = {".jsonl": _lines, ".ndjson": _lines, ".json": _lines, ".parquet": read_parquet}
