"""Files as bytes, decompressed as they are read, and one kind of error for what is damaged or cannot be read here."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BUFFER = 1 << 20  # bytes


def format_suffix(path: Path) -> str:
    """The suffix that says what is in a file: not that of a compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed by its suffix. Raises ValueError where they are damaged."""
    opened = COMPRESSIONS.get(path.suffix, _open_plain)
    with damage_is_an_error(path, EOFError, zlib.error, lzma.LZMAError), opened(path) as file:
        yield file


@contextmanager
def damage_is_an_error(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """ValueError naming the path for these exceptions and for an OSError that is not the system's."""
    caught: tuple[type[Exception], ...] = (*kinds, OSError)
    try:
        yield
    except caught as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: got {error or type(error).__name__}, expected it whole and readable") from error


def require_pyarrow(path: Path) -> Any:
    """pyarrow. Raises ValueError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        message = f"{path}: got no pyarrow to read it with, expected lasp's extra: pip install 'lasp-sp[data]'"
        raise ValueError(message) from error
    return pyarrow


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    pyarrow = require_pyarrow(path)
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), BUFFER)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
