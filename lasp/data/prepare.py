"""Text files and folders become token files: `<prefix>_train` and `<prefix>_valid`, `.bin` and `.idx` each."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from lasp.data.indexed import TokenFileWriter, token_dtype
from lasp.data.tokenizer import BYTE, load_tokenizer

STDLIB = "stdlib"
SUFFIXES = (".txt", ".md", ".rst", ".py")
# Not the library's own source text: what was installed beside it, its tests, generated character tables, old grammars.
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"})


@dataclass(frozen=True, kw_only=True)
class Split:
    """One pair of token files that was written."""

    prefix: str
    documents: int
    tokens: int  # the documents' ends included


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` wrote and what it left out: files that are empty, hold a NUL byte or are not UTF-8."""

    train: Split
    valid: Split | None  # None if valid_fraction is 0
    vocab_size: int
    skipped: tuple[Path, ...]

    def __str__(self) -> str:
        splits = [split for split in (self.train, self.valid) if split]
        lines = [f"{split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens" for split in splits]
        if self.skipped:
            lines.append(f"skipped {len(self.skipped):,} files (empty or not UTF-8 text), the first {self.skipped[0]}")
        return "\n".join(lines)


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path = BYTE,
    *,
    eod: str | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    valid_fraction: float = 0.05,
) -> Prepared:
    """Tokenises every file of `inputs` as one document, which ends with the tokenizer's end-of-document token.

    An input is a file, a folder (its files with one of `suffixes`, recursively, without hidden ones) or the word
    "stdlib": the source text of this Python's standard library, about ten million bytes (`./stdlib` is a folder).
    `tokenizer` and `eod` are those of `load_tokenizer`.

    The validation files get round(valid_fraction · documents) of them, at least one, chosen by a hash of their path
    within the input: the same input gives the same files, byte for byte, on every machine.
    Files of an earlier call with the same prefix are replaced, once everything has been tokenised.

    Raises FileNotFoundError for a missing input or tokenizer, ValueError for a split without documents, and whatever
    OSError reading a file gives; then nothing is written.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction: got {valid_fraction}, expected at least 0 and below 1")
    if bad := [suffix for suffix in suffixes if not suffix.startswith(".")]:
        raise ValueError(f"suffixes: got {bad}, expected each to begin with a dot")
    encoder = load_tokenizer(tokenizer, eod=eod)
    found = {path.resolve(): (name, path) for item in inputs for name, path in _documents(item, suffixes)}
    names, paths = zip(*found.values(), strict=True) if found else ((), ())
    held_out = _held_out(names, valid_fraction)

    skipped = []
    with ExitStack() as stack:
        prefixes = [f"{output_prefix}_train"] + [f"{output_prefix}_valid"] * (valid_fraction > 0)
        dtype = token_dtype(encoder.vocab_size)
        writers = [stack.enter_context(TokenFileWriter(prefix, dtype)) for prefix in prefixes]
        for number, path in enumerate(track(paths, description="tokenising")):
            raw = path.read_bytes()
            if not _is_text(raw):
                skipped.append(path)
                continue
            writers[number in held_out].add_document(np.append(encoder.encode(raw), encoder.eod))
        for prefix, writer in zip(prefixes, writers, strict=True):
            if writer.num_documents == 0:
                raise ValueError(
                    f"inputs: got no document for {prefix} from {[str(item) for item in inputs]}, expected at least 1 "
                    f"({len(paths)} files with a suffix in {tuple(suffixes)}, {len(skipped)} empty or not text; "
                    f"valid_fraction={valid_fraction})"
                )
    if valid_fraction == 0:  # held-out files of an earlier call may now be part of the training text
        for ending in ("bin", "idx"):
            Path(f"{output_prefix}_valid.{ending}").unlink(missing_ok=True)
    splits = [
        Split(prefix=prefix, documents=writer.num_documents, tokens=writer.num_tokens)
        for prefix, writer in zip(prefixes, writers, strict=True)
    ]
    return Prepared(
        train=splits[0],
        valid=splits[1] if valid_fraction else None,
        vocab_size=encoder.vocab_size,
        skipped=tuple(skipped),
    )


def _documents(item: str | Path, suffixes: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The documents of an input: their names within it and their paths, in the order of the names."""
    if item == STDLIB:
        yield from _folder(Path(sysconfig.get_path("stdlib")), (".py",), NOT_STDLIB)
    elif Path(item).is_dir():
        yield from _folder(Path(item), suffixes, frozenset())
    elif Path(item).is_file():
        yield Path(item).name, Path(item)
    else:
        raise FileNotFoundError(f"inputs: {item} is not there; expected a file, a folder or the word {STDLIB!r}")


def _folder(folder: Path, suffixes: Sequence[str], without: frozenset[str]) -> Iterator[tuple[str, Path]]:
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file()}
    for relative in sorted(files, key=Path.as_posix):
        if without.isdisjoint(relative.parts) and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix(), files[relative]


def _held_out(names: Sequence[str], fraction: float) -> set[int]:
    """The numbers of the validation documents."""
    if fraction == 0:
        return set()
    digests = [hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names]
    return set(sorted(range(len(names)), key=digests.__getitem__)[: max(1, round(fraction * len(names)))])


def _is_text(raw: bytes) -> bool:
    try:
        return bool(raw.decode()) and b"\x00" not in raw
    except UnicodeDecodeError:
        return False
