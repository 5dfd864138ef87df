"""Rows of tables: parquet files, and data sets as the library `datasets` saves them to disk. Both need pyarrow.

One batch of rows is in memory at a time, never a whole file.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasp.data.compressed import BUFFER, damage_is_an_error, require_pyarrow

ROWS = 256  # in a batch
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read: the first of the alternatives that it has whole, and those that may be."""

    alternatives: tuple[tuple[str, ...], ...]
    words: str  # for what is expected
    optional: tuple[str, ...] = ()

    def among(self, names: Collection[str], where: str) -> list[str]:
        """Raises ValueError naming the place, if the names are of no alternative."""
        for alternative in self.alternatives:
            if all(name in names for name in alternative):
                return [*alternative, *(name for name in self.optional if name in names)]
        raise ValueError(f"{where}: got {sorted(names)!r}, expected {self.words}")


def is_data_set(names: list[str]) -> bool:
    """Whether a folder with files of these names is a data set that was saved to disk."""
    return STATE_FILE in names and "dataset_info.json" in names


def read_parquet(path: Path, fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1 on, the row's values of the fields). Raises ValueError for what is not such a table."""
    pyarrow = require_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with damage_is_an_error(path, pyarrow.ArrowException, UnicodeDecodeError), pyarrow.OSFile(str(path)) as raw:
        file = ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
        columns = fields.among(file.schema_arrow.names, str(path))
        yield from _rows(file.iter_batches(ROWS, columns=columns))


def read_data_set(folder: Path, fields: Fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """Likewise, from the Arrow streams that the folder's state.json names."""
    pyarrow = require_pyarrow(folder)

    def batches() -> Iterator[Any]:
        for entry in json.loads((folder / STATE_FILE).read_text())["_data_files"]:
            with pyarrow.OSFile(str(folder / entry["filename"])) as raw, pyarrow.ipc.open_stream(raw) as stream:
                columns = fields.among(stream.schema.names, str(folder))
                for batch in stream:
                    yield batch.select(columns)

    with damage_is_an_error(folder, pyarrow.ArrowException, ValueError, KeyError, TypeError):
        yield from _rows(batches())


def _rows(batches: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # pyarrow trusts what lengths and offsets say, and a wrong one ends the process
        for row in zip(*batch.columns, strict=True):
            number += 1
            yield number, {name: value.as_py() for name, value in zip(batch.schema.names, row, strict=True)}
