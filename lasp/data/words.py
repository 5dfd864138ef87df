"""Byte-level BPE word by word: a word's ids do not depend on what is around it, so those of frequent words are kept.

A tokenizer's words are found by its own expression, in Python's `re` with the classes of characters written out. Only
texts of characters whose classes are the same in every version of Unicode are encoded in this way, and only by
expressions that are known here, to exactly the ids that the library gives; all others are for the library.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

# fmt: off
PLAIN = (  # ranges of characters that were in Unicode long ago, and are what they were
    (0x00, 0x1B), (0x20, 0x17E), (0x180, 0x2AF), (0x391, 0x3A1), (0x3A3, 0x3CE), (0x400, 0x513), (0x5D0, 0x5EA),
    (0x621, 0x63A), (0x641, 0x64A), (0x660, 0x669), (0x901, 0x939), (0x93C, 0x94D), (0x958, 0x970), (0xE01, 0xE3A),
    (0xE3F, 0xE5B), (0x1E00, 0x1E9B), (0x1EA0, 0x1EF9), (0x2000, 0x2063), (0x2074, 0x208E), (0x20A0, 0x20B5),
    (0x2100, 0x214D), (0x2153, 0x2188), (0x2190, 0x23E7), (0x2460, 0x26FF), (0x2701, 0x27BF), (0x3000, 0x303F),
    (0x3041, 0x3096), (0x3099, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xFE0F, 0xFE0F), (0xFF01, 0xFFBE),
    (0x1F300, 0x1F64F), (0x1F680, 0x1F6C5), (0x1F900, 0x1F9FF),
)
# fmt: on
SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000").union(map(chr, range(0x2000, 0x200B)))
LONGEST, MOST = 32, 1 << 18  # characters of a word that is kept, and how many words are

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words with the space before them, single digits, punctuation, and white space but for that space.
OWN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN = (_GPT2, _GPT4 % "{1,3}", _GPT4 % "", OWN)  # GPT-2's; Llama 3's; Qwen 2's; that of `lasp tokenizer`


class Words:
    """How a tokenizer of the library `tokenizers` encodes texts, by words."""

    def __init__(self, tokenizer: Any, expression: str, added: list[str], ascii_only: bool) -> None:
        self._find = re.compile(_written_out(expression)).findall
        self._odd = re.compile(r"[^\0-\x1b\x20-\x7f]" if ascii_only else f"[^{_ranges(lambda _: True)}]").search
        self._added = added
        encode = partial(tokenizer.encode, add_special_tokens=False)
        self._ids = _Kept(lambda word: encode(word).ids, np.int32)
        self._starts = _Kept(lambda word: [start for start, _ in encode(word).offsets], np.int64)

    @classmethod
    def of(cls, tokenizer: Any) -> "Words | None":
        """None for a tokenizer that is none of these."""
        told = json.loads(tokenizer.to_str())
        expression, model, normalizer = _expression(told["pre_tokenizer"]), told["model"], told["normalizer"]
        if expression is None or model["type"] != "BPE" or model.get("dropout"):
            return None
        if normalizer not in (None, {"type": "NFC"}):
            return None
        added = [token["content"] for token in told["added_tokens"] if not token["special"]]
        return cls(tokenizer, expression, added, ascii_only=normalizer is not None)

    def knows(self, text: str) -> bool:
        """Whether its ids can be found by words."""
        return self._odd(text) is None and not any(token in text for token in self._added)

    def encode(self, text: str) -> np.ndarray:
        """The ids [tokens], int32, of a text that it knows."""
        return self._ids.of(self._find(text))

    def encode_with_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Likewise, with the character at which each token begins [tokens]."""
        words = self._find(text)
        lengths = _lengths(words)
        begins = np.cumsum(lengths) - lengths
        return self._ids.of(words), np.repeat(begins, self._starts.counts(words)) + self._starts.of(words)


def _lengths(things: Iterable[str] | Iterable[bytes], count: int = -1) -> np.ndarray:
    return np.fromiter(map(len, things), np.int64, count)


class _Kept(dict[str, bytes]):
    """The numbers that a function gives for words, of those that are not long; in the bytes of an array of `dtype`,
    which are joined faster than lists."""

    def __init__(self, function: Callable[[str], list[int]], dtype: type[np.signedinteger]) -> None:
        self._function, self._dtype = function, np.dtype(dtype)

    def of(self, words: list[str]) -> np.ndarray:
        """Those of all words, one after the other."""
        return np.frombuffer(bytearray().join(map(self.__getitem__, words)), self._dtype)

    def counts(self, words: list[str]) -> np.ndarray:
        """How many each has."""
        return _lengths(map(self.__getitem__, words), len(words)) // self._dtype.itemsize

    def __missing__(self, word: str) -> bytes:
        found = np.array(self._function(word), self._dtype).tobytes()
        if len(word) <= LONGEST:
            if len(self) == MOST:
                self.clear()
            self[word] = found
        return found


def _expression(step: Any) -> str | None:
    """The one of KNOWN that finds a tokenizer's words, by the settings of its step before the model."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False}
    if step is None or step["type"] != "Sequence":
        return _GPT2 if step is not None and step.items() >= (by_bytes | {"use_regex": True}).items() else None
    split, *rest = step["pretokenizers"]
    alone = len(rest) == 1 and rest[0].items() >= (by_bytes | {"use_regex": False}).items()
    parts = {"type": "Split", "behavior": "Isolated", "invert": False}
    expression = split.get("pattern", {}).get("Regex") if alone and split.items() >= parts.items() else None
    return expression if expression in KNOWN else None


def _written_out(expression: str) -> str:
    """An expression of KNOWN for `re`, whose classes are those of the characters in PLAIN."""
    letter, number = (_ranges(partial(_is_of, kind)) for kind in "LN")
    space = _ranges(SPACES.__contains__)
    for name, written in (
        ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'[sStTmMdD]|'[rRvV][eE]|'[lL][lL]"),
        (r"[^\r\n\p{L}\p{N}]", rf"[^\r\n{letter}{number}]"),
        (r"[^\s\p{L}\p{N}]", f"[^{space}{letter}{number}]"),
        (r"\p{L}", f"[{letter}]"),
        (r"\p{N}", f"[{number}]"),
        (r"\s", f"[{space}]"),
        (r"\S", f"[^{space}]"),
    ):
        expression = expression.replace(name, written)
    return expression


def _is_of(kind: str, character: str) -> bool:
    return unicodedata.category(character).startswith(kind)


def _ranges(test: Callable[[str], bool]) -> str:
    """The characters of PLAIN that pass, as within the brackets of an expression."""
    parts = []
    for low, high in PLAIN:
        first: int | None = None
        for code in range(low, high + 2):
            inside = code <= high and test(chr(code))
            if inside and first is None:
                first = code
            elif not inside and first is not None:
                parts.append(f"\\U{first:08x}-\\U{code - 1:08x}")
                first = None
    return "".join(parts)
