"""Documents become token files: `<prefix>_train` and `<prefix>_valid`, `.bin` and `.idx` each."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from lasp.config import require
from lasp.data.conversations import ChatTemplate, encode_conversations
from lasp.data.documents import Conversation, Document, Folder, Skipped, Source, by_folder
from lasp.data.encode import encode_all
from lasp.data.indexed import TokenFileWriter, remove_token_files, token_dtype
from lasp.data.sources import SUFFIXES, find_sources
from lasp.data.tokenizer import BYTE, Tokenizer, load_tokenizer

PROGRESS = (TextColumn("{task.fields[documents]:,} documents, {task.completed:,} tokens"), TimeElapsedColumn())
COUNTED = 10_000  # documents, up to which the held-out ones are an exact part


@dataclass(frozen=True, kw_only=True)
class Split:
    """One pair of token files that was written."""

    prefix: str
    documents: int
    tokens: int  # the documents' ends included
    labels: int | None  # how many of them are to be learnt; None if all are


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
        if self.train.labels is not None:
            lines = [f"{line}, {split.labels:,} of them labels" for line, split in zip(lines, splits, strict=True)]
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
    chat: Callable[[], ChatTemplate] | None = None,
    folders: bool = False,
) -> Prepared:
    """Tokenises every document of `inputs`, which ends with the tokenizer's end-of-document token.

    An input is a file, a folder (its files with one of `suffixes`, compressed or not, recursively, without hidden ones)
    or the word "stdlib": the source text of this Python's standard library, about ten million bytes (`./stdlib` is a
    folder). What a file's documents are says `lasp.data.documents`; those of records are their `text_field`, or with
    `chat`, which makes a chat template, conversations (`lasp.data.conversations`), whose files get a mask.
    With `folders` the texts of a folder are one document, each after a line with its file's name; folders in it are
    others. `tokenizer` and `eod` are those of `load_tokenizer`. Memory depends on the largest record, but not on the
    number or size of files.

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
    require(not (folders and chat), "folders", True, "False with conversations")
    files = find_sources(inputs, suffixes, skipped)
    sources: Sequence[Source | Folder] = by_folder(files) if folders else files

    def documents(sources: Iterable[Source | Folder], skipped: Skipped) -> Iterator[Document | Conversation]:
        for source in sources:
            if chat is None or isinstance(source, Folder):
                yield from source.documents(text_field, skipped)
            else:
                yield from source.conversations(skipped)

    for source in sources:
        if source.records is not None:
            next(documents([source], Skipped()), None)  # whether there is such a field
    last_held_out = _last_held_out(documents(sources, Skipped()), valid_fraction)

    with ExitStack() as stack:
        prefixes = [f"{output_prefix}_train"] + [f"{output_prefix}_valid"] * (valid_fraction > 0)
        dtype, masked = token_dtype(encoder.vocab_size), chat is not None
        writers = [stack.enter_context(TokenFileWriter(prefix, dtype, masked=masked)) for prefix in prefixes]
        placed = (
            (writers[_place(number, document) <= last_held_out], document)
            for number, document in enumerate(documents(sources, skipped))
        )
        progress = stack.enter_context(Progress(*PROGRESS))
        bar = progress.add_task("", total=None, documents=0)
        for writer, ids, mask, last in _encoded(encoder, placed, chat, skipped):
            if ids.size:
                writer.add_tokens(ids, mask)
            if last:
                writer.end_document()
            progress.update(bar, advance=ids.size, documents=sum(writer.num_documents for writer in writers))
        for prefix, writer in zip(prefixes, writers, strict=True):
            if writer.num_documents == 0:
                read = f"{len(files)} files with a suffix in {tuple(suffixes)}"
                why = "; ".join([read, *skipped.lines(), f"valid_fraction={valid_fraction}"])
                raise ValueError(
                    f"inputs: got no document for {prefix} from {[str(item) for item in inputs]}, expected at least 1 "
                    f"({why})"
                )
        # Documents of the new training files may be held out in the old validation files, so no old index stays.
        for split in ("train", "valid"):
            Path(f"{output_prefix}_{split}.idx").unlink(missing_ok=True)
        if valid_fraction == 0:
            remove_token_files(f"{output_prefix}_valid")
    splits = [
        Split(
            prefix=prefix,
            documents=writer.num_documents,
            tokens=writer.num_tokens,
            labels=writer.num_labels if writer.masked else None,
        )
        for prefix, writer in zip(prefixes, writers, strict=True)
    ]
    return Prepared(
        train=splits[0], valid=splits[1] if valid_fraction else None, vocab_size=encoder.vocab_size, skipped=skipped
    )


Encoded = tuple[TokenFileWriter, np.ndarray, np.ndarray | None, bool]


def _encoded(
    tokenizer: Tokenizer,
    documents: Iterator[tuple[TokenFileWriter, Any]],
    chat: Callable[[], ChatTemplate] | None,
    skipped: Skipped,
) -> Iterator[Encoded]:
    """(writer, ids, their mask, whether they end the document), of texts in parts, with the end of each document."""
    if chat is not None:
        for writer, ids, mask in encode_conversations(tokenizer, cache(chat), documents, skipped):
            yield writer, ids, mask, True
        return
    for writer, ids, last in encode_all(tokenizer, ((writer, document.parts) for writer, document in documents)):
        yield writer, np.append(ids, tokenizer.eod) if last else ids, None, last


def _place(number: int, document: Document | Conversation) -> tuple[int, int]:
    """Where a document stands in the order in which documents are held out: by its name's hash, 64 bits."""
    name = document.name.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()), number


def _last_held_out(documents: Iterator[Document | Conversation], fraction: float) -> tuple[int, int]:
    """The place of the last validation document."""
    if fraction == 0:
        return -1, 0
    places = sorted(_place(number, document) for number, document in enumerate(islice(documents, COUNTED + 1)))
    if len(places) > COUNTED:
        return int(fraction * 2**64), 0
    return places[max(1, round(fraction * len(places))) - 1] if places else (-1, 0)
