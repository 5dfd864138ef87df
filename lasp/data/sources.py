"""What `lasp prepare` is told to read becomes a list of files, and a count of what it leaves out."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from lasp.config import require
from lasp.data.compressed import format_suffix
from lasp.data.documents import Skipped, Source, why_no_text
from lasp.data.tables import is_data_set

STDLIB = "stdlib"
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", ".parquet")
# Not the library's own source text: what was installed beside it, its tests, generated character tables, old grammars.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"})
TABLES = (".csv", ".tsv")  # text, but no document


def find_sources(inputs: Sequence[str | Path], suffixes: Sequence[str], skipped: Skipped) -> list[Source]:
    """The sources of all inputs, each once, those of a folder in the order of their names.

    Raises FileNotFoundError for an input that is not there, ValueError if there is none, or for a file named outright
    that is none of what `lasp.data.documents` reads.
    """
    require(len(inputs) > 0, "inputs", inputs, f"at least one file, folder or the word {STDLIB!r}")
    found: dict[Path, Source] = {}
    for item in inputs:
        for source in _sources(item, suffixes, skipped):
            found.setdefault(source.path.resolve(), source)
    return list(found.values())


def _sources(item: str | Path, suffixes: Sequence[str], skipped: Skipped) -> Iterator[Source]:
    path = Path(item)
    if item == STDLIB:
        for source in _folder(Path(sysconfig.get_path("stdlib")), (".py",), Skipped()):
            if NOT_STDLIB.isdisjoint(Path(source.name).parts):
                yield source
    elif path.is_dir():
        yield from _folder(path, suffixes, skipped)
    elif path.is_file():
        source = Source(path.name, path)
        require(format_suffix(path) not in TABLES, "inputs", str(path), "JSON Lines or parquet for a table's rows")
        if source.records is None:
            problem = why_no_text(path)
            require(problem in (None, "empty files"), "inputs", str(path), f"a text; it is one of the {problem}")
        yield source
    else:
        raise FileNotFoundError(f"inputs: {item} is not there; expected a file, a folder or the word {STDLIB!r}")


def _folder(folder: Path, suffixes: Sequence[str], skipped: Skipped) -> Iterator[Source]:
    """The folder's files with one of the suffixes, and the data sets in it."""
    paths = {path.relative_to(folder).as_posix(): path for path in _walk(folder, skipped)}
    for name in sorted(paths):
        path = paths[name]
        suffix = format_suffix(path)
        if path.is_dir() or (suffix in suffixes and path.is_file()):
            yield Source(name, path)
        elif not path.exists():
            skipped.add("links to nowhere", path)
        elif not path.is_file():
            skipped.add("that are no regular files", path)
        else:
            skipped.add(f"files with the suffix {suffix}" if suffix else "files without a suffix", path)


def _walk(folder: Path, skipped: Skipped) -> Iterator[Path]:
    """All files and saved data sets under a folder. Links are followed, but no folder twice: they may form a circle."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(root)
        if (real := here.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        if "dataset_dict.json" in files:
            splits = ", ".join(sorted(name for name in folders if not name.startswith(".")))
            raise ValueError(
                f"inputs: got {here}, a data set of several splits, expected the folders of some: {splits}"
            )
        if is_data_set(files):
            folders.clear()
            yield here
            continue
        for hidden in [name for name in (*folders, *files) if name.startswith(".")]:
            skipped.add("hidden files and folders", here / hidden)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in files if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error
