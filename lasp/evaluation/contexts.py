"""Contexts to evaluate on: token files and texts, each document once and, where it fits, whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lasp.config import require
from lasp.data import Context, TokenFile, Tokenizer
from lasp.data.indexed import VocabularyTokens


def whole_documents(file: TokenFile, tokens: int, vocab_size: int) -> Iterator[Context]:
    """All documents of a file in its order, as many in a context as have at most so many tokens together, one at least.

    Reading a token that is not below vocab_size raises ValueError.
    """
    starts, first = file.document_starts, 0
    while first < file.num_documents:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + tokens, side="right")) - 1)
        pieces, source = starts[first : last + 1] - starts[first], starts[first:last]
        filled = np.diff(pieces) > 0  # Megatron's format allows empty documents
        if filled.any():
            borders = np.append(pieces[:-1][filled], pieces[-1])
            ids = VocabularyTokens(file, vocab_size)
            yield Context(ids, borders, source[filled], starts[first + 1 : last + 1][filled], file.mask)
        first = last


def text_contexts(paths: Sequence[str], tokenizer: Tokenizer, tokens: int) -> Iterator[Context]:
    """Files of UTF-8 text, each a document, in contexts of `tokens` tokens and what is left over.

    A document that goes on in the next context begins afresh there. Raises ValueError for a file of fewer than two
    tokens, FileNotFoundError or another OSError for one that cannot be read.
    """
    for path in paths:
        try:
            ids = tokenizer.encode(Path(path).read_bytes().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"texts: got {path} ({error}), expected UTF-8") from error
        require(len(ids) >= 2, "texts", path, "a text of at least two tokens")
        for start in range(0, len(ids) - 1, tokens):
            length = min(tokens, len(ids) - start)
            yield Context(ids, np.array([0, length]), np.array([start]), np.array([len(ids)]))
