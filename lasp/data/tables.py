"""Rows of tables: parquet files, and data sets as the library `datasets` saves them to disk. Both need pyarrow.

One batch of rows is in memory at a time, never a whole file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lasp.config import require
from lasp.data.compressed import BUFFER, damage_is_an_error, require_pyarrow

ROWS = 256  # in a batch
STATE_FILE = "state.json"


def is_data_set(names: list[str]) -> bool:
    """Whether a folder with files of these names is a data set that was saved to disk."""
    return STATE_FILE in names and "dataset_info.json" in names


def read_parquet(path: Path, field: str) -> Iterator[tuple[int, object]]:
    """(number from 1 on, the row's value of the field). Raises ValueError for what is not such a table."""
    pyarrow = require_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with damage_is_an_error(path, pyarrow.ArrowException, UnicodeDecodeError), pyarrow.OSFile(str(path)) as raw:
        file = ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False)
        _require_column(file.schema_arrow, field, path)
        yield from _values(file.iter_batches(ROWS, columns=[field]), field)


def read_data_set(folder: Path, field: str) -> Iterator[tuple[int, object]]:
    """Likewise, from the Arrow streams that the folder's state.json names."""
    pyarrow = require_pyarrow(folder)

    def batches() -> Iterator[Any]:
        for entry in json.loads((folder / STATE_FILE).read_text())["_data_files"]:
            with pyarrow.OSFile(str(folder / entry["filename"])) as raw, pyarrow.ipc.open_stream(raw) as stream:
                _require_column(stream.schema, field, folder)
                yield from stream

    with damage_is_an_error(folder, pyarrow.ArrowException, UnicodeDecodeError, KeyError):
        yield from _values(batches(), field)


def _values(batches: Iterator[Any], field: str) -> Iterator[tuple[int, object]]:
    number = 0
    for batch in batches:
        for value in batch.column(field):
            number += 1
            yield number, value.as_py()


def _require_column(schema: Any, field: str, path: Path) -> None:
    require(field in schema.names, str(path), schema.names, f"the field {field!r} (--text-field)")
