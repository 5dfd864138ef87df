"""Documents become token files: `<prefix>_train` and `<prefix>_valid`, `.bin` and `.idx` each."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from lasp.data.documents import Document, Skipped, Source
from lasp.data.encode import encode_all
from lasp.data.indexed import TokenFileWriter, token_dtype
from lasp.data.sources import SUFFIXES, find_sources
from lasp.data.tokenizer import BYTE, load_tokenizer

PROGRESS = (TextColumn("{task.fields[documents]:,} documents, {task.completed:,} tokens"), TimeElapsedColumn())
COUNTED = 10_000  # documents, up to which the held-out ones are an exact part


@dataclass(frozen=True, kw_only=True)
class Split:
    """One pair of token files that was written."""

    prefix: str
    documents: int
    tokens: int  # the documents' ends included


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` wrote, and how much it left out for what reason."""

    train: Split
    valid: Split | None  # None if valid_fraction is 0
    vocab_size: int
    skipped: Skipped

    def __str__(self) -> str:
        splits = [split for split in (self.train, self.valid) if split]
        lines = [f"{split.prefix}: {split.documents:,} documents, {split.tokens:,} tokens" for split in splits]
        return "\n".join([*lines, *self.skipped.lines()])


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str | Path = BYTE,
    *,
    eod: str | None = None,
    text_field: str = "text",
    suffixes: Sequence[str] = SUFFIXES,
    valid_fraction: float = 0.05,
) -> Prepared:
    """Tokenises every document of `inputs`, which ends with the tokenizer's end-of-document token.

    An input is a file, a folder (its files with one of `suffixes`, compressed or not, recursively, without hidden ones)
    or the word "stdlib": the source text of this Python's standard library, about ten million bytes (`./stdlib` is a
    folder). What a file's documents are says `lasp.data.documents`; those of records are their `text_field`.
    `tokenizer` and `eod` are those of `load_tokenizer`. Memory depends on the largest record, but not on the number or
    size of files.

    The validation files get round(valid_fraction · documents) of them, at least one, chosen by a hash of their path
    within the input and their line or row; of more than 10,000 documents, those whose hash is in that part of its
    range. The same input gives the same files, byte for byte, on every machine.
    Files of an earlier call with the same prefix are replaced, once everything has been tokenised.

    Raises FileNotFoundError for a missing input or tokenizer. Raises ValueError, before anything is tokenised, for a
    file named outright that is none of the above, and for records without the field; later, naming file and line or
    row, for a damaged record, and for a split without documents. Reading a file may raise OSError. Then nothing is
    written.
    """
    if not 0 <= valid_fraction < 1:
        raise ValueError(f"valid_fraction: got {valid_fraction}, expected at least 0 and below 1")
    if bad := [suffix for suffix in suffixes if not suffix.startswith(".")]:
        raise ValueError(f"suffixes: got {bad}, expected each to begin with a dot")
    encoder = load_tokenizer(tokenizer, eod=eod)
    skipped = Skipped()
    sources = find_sources(inputs, suffixes, skipped)
    for source in sources:
        if source.records is not None:
            next(source.documents(text_field, Skipped()), None)  # whether there is such a field
    last_held_out = _last_held_out(_documents(sources, text_field, Skipped()), valid_fraction)

    with ExitStack() as stack:
        prefixes = [f"{output_prefix}_train"] + [f"{output_prefix}_valid"] * (valid_fraction > 0)
        dtype = token_dtype(encoder.vocab_size)
        writers = [stack.enter_context(TokenFileWriter(prefix, dtype)) for prefix in prefixes]
        texts = (
            (writers[_place(number, document) <= last_held_out], document.parts)
            for number, document in enumerate(_documents(sources, text_field, skipped))
        )
        progress = stack.enter_context(Progress(*PROGRESS))
        bar = progress.add_task("", total=None, documents=0)
        for writer, ids, last in encode_all(encoder, texts):
            if last:
                writer.add_tokens(np.append(ids, encoder.eod))
                writer.end_document()
            elif ids.size:
                writer.add_tokens(ids)
            progress.update(bar, advance=ids.size, documents=sum(writer.num_documents for writer in writers))
        for prefix, writer in zip(prefixes, writers, strict=True):
            if writer.num_documents == 0:
                raise ValueError(
                    f"inputs: got no document for {prefix} from {[str(item) for item in inputs]}, expected at least 1 "
                    f"({len(sources)} files with a suffix in {tuple(suffixes)}; {'; '.join(skipped.lines())}; "
                    f"valid_fraction={valid_fraction})"
                )
        # Documents of the new training files may be held out in the old validation files, so no old index stays.
        for ending in ("train.idx", "valid.idx") + ("valid.bin",) * (valid_fraction == 0):
            Path(f"{output_prefix}_{ending}").unlink(missing_ok=True)
    splits = [
        Split(prefix=prefix, documents=writer.num_documents, tokens=writer.num_tokens)
        for prefix, writer in zip(prefixes, writers, strict=True)
    ]
    return Prepared(
        train=splits[0], valid=splits[1] if valid_fraction else None, vocab_size=encoder.vocab_size, skipped=skipped
    )


def _documents(sources: Iterable[Source], text_field: str, skipped: Skipped) -> Iterator[Document]:
    for source in sources:
        yield from source.documents(text_field, skipped)


def _place(number: int, document: Document) -> tuple[int, int]:
    """Where a document stands in the order in which documents are held out: by its name's hash, 64 bits."""
    name = document.name.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()), number


def _last_held_out(documents: Iterator[Document], fraction: float) -> tuple[int, int]:
    """The place of the last validation document."""
    if fraction == 0:
        return -1, 0
    places = sorted(_place(number, document) for number, document in enumerate(islice(documents, COUNTED + 1)))
    if len(places) > COUNTED:
        return int(fraction * 2**64), 0
    return places[max(1, round(fraction * len(places))) - 1] if places else (-1, 0)
