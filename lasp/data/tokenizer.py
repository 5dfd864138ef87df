"""Tokenizers: the built-in byte tokenizer and Hugging Face `tokenizer.json` files."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from lasp.data.words import Words

BYTE = "byte"
USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<eod>", "[EOS]", "[EOD]")
Encoded = TypeVar("Encoded")


class Tokenizer(Protocol):
    """What the rest of lasp asks of a tokenizer; ids are in [0, vocab_size)."""

    vocab_size: int
    eod: int  # the id that ends every document
    cheap: bool  # too quick to be worth processes of its own
    overlap: int  # characters that two parts of a long text must share, for what is beyond them not to matter

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids [tokens], int32, of a text (bytes are UTF-8), without any begin or end token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as `encode` gives them."""
        ...

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Likewise, with the character of the text at which each token begins [tokens]. Takes longer."""
        ...

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of ids [tokens]; eod and other special tokens give no text. ValueError for an id out of range."""
        ...


class ByteTokenizer:
    """Ids 0…255 are the bytes of the UTF-8 text, 256 is the end of a document."""

    vocab_size = 257
    eod = 256
    cheap = True
    overlap = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        # A character's bytes but the first are 10…… in binary.
        return [(ids, np.cumsum((ids & 0xC0) != 0x80) - 1) for ids in self.encode_batch(texts)]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        checked = _in_range(ids, self.vocab_size)
        # A model may stop inside a character, so its output need not be whole UTF-8.
        return checked[checked < self.eod].astype(np.uint8).tobytes().decode(errors="replace")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

    cheap = False
    overlap = 2048

    def __init__(self, path: Path, eod: str | None = None) -> None:
        import tokenizers

        with _whole(path):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # Documents are encoded whole, and a special token's name inside a text is text, not a document's end.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may have gaps
        candidates = (*USUAL_EOD, *_named_end(path)) if eod is None else (eod,)
        name = next((name for name in candidates if name in ids), None)
        if name is None:
            raise ValueError(f"eod: got {eod!r}, expected the name of a token of {path}; none of {candidates} is one")
        self.eod = ids[name]
        self._words = Words.of(self._tokenizer)
        self._made_from = path, eod

    def __reduce__(self) -> tuple:
        return JsonTokenizer, self._made_from

    def encode(self, text: str | bytes) -> np.ndarray:
        string = text if isinstance(text, str) else text.decode()
        with _whole(self._made_from[0]):
            ids = self._tokenizer.encode(string, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._by_words(texts, Words.encode, self._encode_whole)

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return self._by_words(texts, Words.encode_with_starts, self._encode_whole_with_starts)

    def _by_words(
        self,
        texts: Sequence[str],
        by_words: Callable[[Words, str], Encoded],
        whole: Callable[[Sequence[str]], list[Encoded]],
    ) -> list[Encoded]:
        """What `by_words` gives for the texts that can be encoded so, and `whole` for the others."""
        words = self._words
        if words is None:
            return whole(texts)
        known = [words.knows(text) for text in texts]
        others = iter(whole([text for text, is_known in zip(texts, known, strict=True) if not is_known]))
        return [
            by_words(words, text) if is_known else next(others) for text, is_known in zip(texts, known, strict=True)
        ]

    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _whole(self._made_from[0]):
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_whole_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        with _whole(self._made_from[0]):
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (np.array(e.ids, dtype=np.int32), np.array(e.offsets, dtype=np.int64).reshape(-1, 2)[:, 0])
            for e in encodings
        ]

    def decode(self, ids: np.ndarray | list[int]) -> str:
        return self._tokenizer.decode(_in_range(ids, self.vocab_size).tolist(), skip_special_tokens=True)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """ValueError naming the file for the bare Exceptions that the library raises, also where texts are encoded."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"tokenizer: got {path}, expected a Hugging Face tokenizer.json ({error})") from error


def _named_end(path: Path) -> Sequence[str]:
    """The end that the tokenizer's own configuration names, beside its file."""
    beside = path.with_name("tokenizer_config.json")
    if path.name != "tokenizer.json" or not beside.is_file():
        return ()
    try:
        named = json.loads(beside.read_text())["eos_token"]
    except KeyError:
        return ()
    except (ValueError, TypeError) as error:
        raise ValueError(f"tokenizer: got {beside} ({error}), expected a JSON object") from error
    named = named.get("content") if isinstance(named, dict) else named
    return (named,) if isinstance(named, str) else ()


def load_tokenizer(name_or_path: str | Path = BYTE, *, eod: str | None = None) -> Tokenizer:
    """The tokenizer called "byte", or the one of a `tokenizer.json` (or of the folder that holds it).

    `eod` names a tokenizer.json's end-of-document token; None looks for the usual names, and then for the one that a
    tokenizer_config.json beside it has. Raises FileNotFoundError if
    there is no such file, ValueError if it is not a tokenizer or has no end-of-document token.
    """
    if name_or_path == BYTE:
        if eod is not None:
            raise ValueError(f"eod: got {eod!r}, expected None for the byte tokenizer, whose end of document is 256")
        return ByteTokenizer()
    return JsonTokenizer(tokenizer_file(name_or_path), eod)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json at a path or in the folder there. Raises FileNotFoundError if there is none."""
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer: {file} is not there; expected {BYTE!r} or a Hugging Face tokenizer.json's path"
        )
    return file


def _in_range(ids: np.ndarray | list[int], vocab_size: int) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(f"ids: got values from {array.min()} to {array.max()}, expected 0 to {vocab_size - 1}")
    return array
