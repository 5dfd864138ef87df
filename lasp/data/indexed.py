"""Token files in Megatron's `.bin` / `.idx` format, so that corpora prepared for either work with both.

`.bin` holds the tokens of all documents, one after the other. `.idx`, little-endian without gaps: the magic, version
(u64), type code (u8), number of sequences S and of document borders D + 1 (u64 each); the sequences' lengths
(i32 [S]) and byte offsets in `.bin` (i64 [S]); the sequence number at which each document begins, then S (i64 [D + 1]).

Beside them may lie `.mask`, lasp's own: a byte for each token of `.bin`, 0 if the token is no label, so that nothing is
learnt from predicting it (a prompt, say), else 1. Megatron does not look at it. Without it every token is a label, but
for the first one of each document, which nothing predicts.
"""

import hashlib
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
LENGTH, BORDER = struct.Struct("<i"), struct.Struct("<q")
COPIED = 1 << 20  # bytes at a time
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
SAMPLES, SAMPLE_TOKENS = 256, 4096  # what a fingerprint reads of the tokens
FLOAT_CODES = {6: "float64", 7: "float32"}  # in Megatron's table, but no tokens
Integers = np.ndarray | Sequence[int]


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron gives the tokens of a vocabulary: uint16 where it fits, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


ENDINGS = (".bin", ".mask", ".idx")


def remove_token_files(prefix: str | Path) -> None:
    """Those of that name that are there; the index first, for it is only ever beside its own tokens."""
    for ending in reversed(ENDINGS):
        Path(f"{prefix}{ending}").unlink(missing_ok=True)


class TokenFileWriter:
    """Writes `<prefix>.bin` and `<prefix>.idx`, and `<prefix>.mask` if it is masked; a context manager.

    The files appear under their names when the `with` block ends; if it ends by an exception, what was there before
    stays as it was. ValueError at the end if it is masked and no token is a label. Documents longer than `max_sequence`
    (the format's lengths are int32) become several sequences. The index waits on disk, too, so that memory does not
    grow with the number of documents.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype | type, *, masked: bool = False, max_sequence: int = 2**31 - 1
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = {known: code for code, known in DTYPES.items()}
        if self.dtype not in codes:
            raise ValueError(f"dtype: got {self.dtype}, expected one of {', '.join(map(str, codes))}")
        self._code = codes[self.dtype]
        self._max_sequence = max_sequence
        self.prefix, self.masked = str(prefix), masked
        self._temporary = {ending: Path(f"{prefix}{ending}.{os.getpid()}.tmp") for ending in ENDINGS}
        self.num_documents = self.num_tokens = self.num_labels = 0
        self._num_sequences = self._unended = 0

    def __enter__(self) -> Self:
        folder = Path(self.prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lengths, self._borders = TemporaryFile(dir=folder), TemporaryFile(dir=folder)
        self._borders.write(BORDER.pack(0))
        self._bin = self._temporary[".bin"].open("wb")
        self._mask = self._temporary[".mask"].open("wb") if self.masked else None
        return self

    def add_document(self, tokens: Integers, mask: Integers | None = None) -> None:
        """Appends a document, [tokens] with at least one, and which of its tokens are labels, if the file is masked.

        ValueError if the tokens do not fit the file's type, or the mask the tokens.
        """
        self.add_tokens(tokens, mask)
        self.end_document()

    def add_tokens(self, tokens: Integers, mask: Integers | None = None) -> None:
        """Appends tokens, at least one, to the document that the next `end_document` ends."""
        array = np.asarray(tokens)
        limits = np.iinfo(self.dtype)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise ValueError(
                f"tokens: got {array.dtype}{list(array.shape)}, expected one dimension of at least one integer"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > limits.max:
            raise ValueError(f"tokens: got values from {low} to {high}, expected 0 to {limits.max} ({self.dtype})")
        if (mask is not None) != self.masked:
            expected = "one, as masked=True says" if self.masked else "none without masked=True"
            raise ValueError(f"mask: got {'none' if mask is None else 'one'}, expected {expected}")
        if mask is not None and self._mask is not None:
            labels = np.asarray(mask)
            if labels.shape != array.shape or not ((labels == 0) | (labels == 1)).all():
                raise ValueError(f"mask: got {labels.dtype}{list(labels.shape)}, expected {array.size} zeros and ones")
            self._mask.write(labels.astype(np.uint8).tobytes())
            self.num_labels += int(labels[self._unended == 0 :].sum())
        self._bin.write(array.astype(self.dtype).tobytes())
        self._unended += array.size

    def end_document(self) -> None:
        """Ends the document. ValueError if it has no token."""
        if self._unended == 0:
            raise ValueError("tokens: got none, expected at least one in a document")
        self.num_tokens += self._unended
        while self._unended:
            length = min(self._unended, self._max_sequence)
            self._lengths.write(LENGTH.pack(length))
            self._num_sequences += 1
            self._unended -= length
        self._borders.write(BORDER.pack(self._num_sequences))
        self.num_documents += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._bin, self._mask or nullcontext(), self._lengths, self._borders:
                if kind is None:
                    self._commit()
        finally:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _commit(self) -> None:
        _require_labels(self.prefix, not self.masked or self.num_labels > 0)
        with self._temporary[".idx"].open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, self._num_sequences, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, index)
            self._lengths.seek(0)
            offset = 0
            while block := self._lengths.read(COPIED):
                ends = offset + np.cumsum(np.frombuffer(block, dtype="<i4"), dtype="<i8") * self.dtype.itemsize
                index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            self._borders.seek(0)
            shutil.copyfileobj(self._borders, index)
            for file in (self._bin, self._mask, index):
                if file is not None:
                    file.flush()
                    os.fsync(file.fileno())
        remove_token_files(self.prefix)
        for ending, temporary in self._temporary.items():
            if temporary.exists():
                temporary.replace(f"{self.prefix}{ending}")


def _require_labels(prefix: str, some: bool) -> None:
    if not some:
        raise ValueError(
            f"{prefix}.mask: got no label, expected at least one token to be predicted that is not its document's "
            "first: a completion or an assistant's turn that is not empty"
        )


class TokenFile:
    """Token files, memory-mapped: nothing of `.bin` is read before it is asked for.

    `tokens` [num_tokens] holds all documents, `document_starts` int64 [num_documents + 1] where each begins in it,
    `mask` uint8 [num_tokens] which of them are labels, or None if all are. Opening checks the files against the format
    and each other: FileNotFoundError if one is missing, ValueError naming the file, what was found and what was
    expected if one is corrupt or cut short, or if the mask leaves no label.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.mask_path, self.idx_path = (Path(f"{prefix}{ending}") for ending in ENDINGS)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there; expected token files {prefix}.bin and {prefix}.idx")
        self.dtype, self.document_starts = self._read_index()
        num_tokens = int(self.document_starts[-1])
        size, expected = self.bin_path.stat().st_size, num_tokens * self.dtype.itemsize
        if size != expected:
            raise ValueError(
                f"{self.bin_path}: got {size} bytes, expected {expected} "
                f"({num_tokens} {self.dtype} tokens by {self.idx_path})"
            )
        if num_tokens == 0:
            raise ValueError(f"{self.bin_path}: got 0 tokens, expected at least 1")
        self.tokens: np.ndarray = np.memmap(self.bin_path, dtype=self.dtype, mode="r").view(np.ndarray)
        self.mask = self._open_mask() if self.mask_path.exists() else None

    def _open_mask(self) -> np.ndarray:
        size = self.mask_path.stat().st_size
        if size != self.num_tokens:
            raise ValueError(f"{self.mask_path}: got {size} bytes, expected one for each of {self.num_tokens} tokens")
        mask = np.memmap(self.mask_path, dtype=np.uint8, mode="r").view(np.ndarray)
        _require_labels(self.prefix, any(self._has_label(mask, begin) for begin in range(0, size, COPIED)))
        return mask

    def _has_label(self, mask: np.ndarray, begin: int) -> bool:
        """Whether one of the COPIED tokens from `begin` on is a label."""
        block = mask[begin : begin + COPIED].copy()
        low, high = np.searchsorted(self.document_starts[:-1], (begin, begin + len(block)))
        block[self.document_starts[low:high] - begin] = 0
        return bool(block.any())

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.document_starts[-1])

    def document(self, index: int) -> np.ndarray:
        """Document `index` as a view [tokens] of the memory map; slicing it further reads only the slice."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document: got {index}, expected 0 to {self.num_documents - 1} in {self.bin_path}")
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]

    def fingerprint(self, vocab_size: int | None = None) -> str:
        """What tells these files from others, at the cost of a few reads however large they are.

        The numbers of tokens and documents, their type, and a hash of all documents' borders and of 256 blocks of 4096
        tokens and their mask, the first, the last and evenly between: of all tokens, if there are fewer than a million.
        Larger files that differ only between the blocks have one fingerprint. With a vocab_size, raises ValueError for
        a token in the blocks that is not of the vocabulary.
        """
        tokens = self.tokens if vocab_size is None else VocabularyTokens(self, vocab_size)
        digest = hashlib.blake2b(self.document_starts.tobytes(), digest_size=16)
        starts = np.linspace(0, max(0, self.num_tokens - SAMPLE_TOKENS), SAMPLES, dtype=np.int64)
        for start in np.unique(starts):
            places = np.arange(start, min(start + SAMPLE_TOKENS, self.num_tokens))
            digest.update(tokens[places].tobytes())
            if self.mask is not None:
                digest.update(self.mask[places].tobytes())
        return f"{self.num_tokens} {self.dtype} tokens in {self.num_documents} documents, hash {digest.hexdigest()}"

    def _read_index(self) -> tuple[np.dtype, np.ndarray]:
        """The tokens' type and the documents' starts, from the checked index."""
        size = self.idx_path.stat().st_size
        with self.idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        self._expect(len(head) == HEADER.size, f"{size} bytes", f"at least the header's {HEADER.size}")
        magic, version, code, num_sequences, num_borders = HEADER.unpack(head)
        self._expect(magic == MAGIC, f"magic {magic!r}", f"{MAGIC!r} (Megatron's .idx format)")
        self._expect(version == VERSION, f"version {version}", str(VERSION))
        got = f"type code {code}" + (f" ({FLOAT_CODES[code]})" if code in FLOAT_CODES else "")
        self._expect(code in DTYPES, got, f"an integer type, one of the codes {', '.join(map(str, DTYPES))}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_borders
        counts = f"{num_sequences} sequences and {num_borders} document borders"
        note = "; a multimodal index is not supported" if size == expected + num_sequences else ""
        self._expect(size == expected, f"{size} bytes", f"{expected} for {counts}{note}")
        self._expect(num_borders >= 2, f"{num_borders} document borders", "at least 2 (one document)")

        raw = np.memmap(self.idx_path, mode="r").view(np.ndarray)
        parts = np.split(raw[HEADER.size :], [4 * num_sequences, 12 * num_sequences])
        lengths, pointers, borders = parts[0].view("<i4"), parts[1].view("<i8"), parts[2].view("<i8")
        dtype = DTYPES[code]
        starts = np.zeros(num_sequences + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        self._expect(bool((lengths >= 0).all()), "a negative sequence length", "lengths of at least 0")
        self._expect(
            np.array_equal(pointers, starts[:-1] * dtype.itemsize),
            "byte offsets that do not follow from the lengths",
            "sequences one after the other",
        )
        self._expect(
            borders[0] == 0 and borders[-1] == num_sequences and bool((np.diff(borders) >= 0).all()),
            f"document borders from {borders[0]} to {borders[-1]}",
            f"ascending ones from 0 to the {num_sequences} sequences",
        )
        return dtype, starts[borders]

    def _expect(self, condition: bool, got: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{self.idx_path}: got {got}, expected {expected}")


class VocabularyTokens:
    """A token file's tokens, which may be read at any places [N] of the file as long as they are of the vocabulary."""

    def __init__(self, file: TokenFile, vocab_size: int) -> None:
        self._file, self._vocab_size = file, vocab_size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Raises ValueError naming the file, the document, the position in it and the id, if one is not."""
        file, ids = self._file, self._file.tokens[places]
        outside = (ids < 0) | (ids >= self._vocab_size)
        if outside.any():
            place = places[outside][0]
            document = np.searchsorted(file.document_starts, place, side="right") - 1
            position = place - file.document_starts[document]
            raise ValueError(
                f"{file.bin_path}: got token id {ids[outside][0]} at position {position} of document {document}, "
                f"expected 0 to {self._vocab_size - 1} (vocab_size={self._vocab_size})"
            )
        return ids
