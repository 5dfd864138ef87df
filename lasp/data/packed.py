"""Packed contexts: documents in a seeded order form one endless stream, cut into contexts of equal length.

Context i is a pure function of (files, context length, seed, i): resuming needs no state but i, and a rank reads only
the tokens of its own units. A document that a context's end cuts starts afresh in the next one.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lasp.data.indexed import TokenFile, VocabularyTokens

MOST_ROWS = 4096  # of a batch: GPUs take so many in every kernel
IGNORED = -100  # the label of positions without a loss, PyTorch's cross-entropy's default


class Context:
    """`length` consecutive tokens of the stream: pieces of documents, read from the memory map when asked for.

    `cu_seqlens`, int64 [pieces + 1] on the CPU, begins with 0 and ends with `length`.
    """

    def __init__(
        self,
        tokens: np.ndarray | VocabularyTokens,
        pieces: np.ndarray,
        sources: np.ndarray,
        ends: np.ndarray,
        mask: np.ndarray | None = None,
    ) -> None:
        """tokens [file]: all documents; pieces [P + 1]: where they begin in the context, then its length;
        sources [P]: where they begin in `tokens`; ends [P]: where the documents they belong to end in `tokens`;
        mask [file]: which tokens are labels, all if None."""
        self._tokens, self._pieces, self._sources, self._ends, self._mask = tokens, pieces, sources, ends, mask
        self.length = int(pieces[-1])
        self.cu_seqlens = torch.from_numpy(pieces)

    @property
    def row_length(self) -> int | None:
        """The pieces' length, if there are several and all are equally long: they can be the rows of a batch."""
        lengths = np.diff(self._pieces)
        return int(lengths[0]) if 1 < len(lengths) <= MOST_ROWS and (lengths == lengths[0]).all() else None

    def tokens(self, start: int, stop: int) -> Tensor:
        """The tokens of positions start…stop, int64 [stop - start]."""
        source, _ = self._locate(start, stop)
        return self._read(source)

    def labels(self, start: int, stop: int) -> Tensor:
        """For positions start…stop the document's next token, int64 [stop - start]; -100 at the document's last one,
        and where the next one is masked.

        Where the context's end cuts a document, the last label is the true next token, which is not in the context.
        """
        following, scored = self._following(start, stop)
        return self._read(following).masked_fill_(torch.from_numpy(~scored), IGNORED)

    def count_labels(self) -> int:
        """How many positions have a label; no token is read for that."""
        if self._mask is not None:
            return int(self._following(0, self.length)[1].sum())
        last = self._sources + np.diff(self._pieces) == self._ends  # the pieces that their document's end ends
        return self.length - int(last.sum())

    def _following(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position the next token's place in the file, its own at a document's end, and if that is a label."""
        source, end = self._locate(start, stop)
        scored = source + 1 < end
        following = source + scored
        return following, scored if self._mask is None else scored & (self._mask[following] != 0)

    def _locate(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position its place in the file and the end of its document there."""
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"start, stop: got {start}, {stop}, expected 0 <= start <= stop <= {self.length}")
        here = np.diff(self._pieces.clip(start, stop))  # how many of these positions lie in each piece
        source = np.repeat(self._sources - self._pieces[:-1], here) + np.arange(start, stop)
        return source, np.repeat(self._ends, here)

    def _read(self, source: np.ndarray) -> Tensor:
        return torch.from_numpy(self._tokens[source].astype(np.int64))


class Joined(Context):
    """Contexts one behind the other, computed as one; documents that two of them share stay apart."""

    def __init__(self, parts: Sequence[Context]) -> None:
        self._parts = list(parts)
        self._begins = np.cumsum([0, *(part.length for part in parts)])
        pieces = [part.cu_seqlens.numpy()[:-1] + begin for part, begin in zip(parts, self._begins, strict=False)]
        self._pieces = np.concatenate([*pieces, self._begins[-1:]])
        self.length = int(self._pieces[-1])
        self.cu_seqlens = torch.from_numpy(self._pieces)

    def tokens(self, start: int, stop: int) -> Tensor:
        return torch.cat([part.tokens(*inside) for part, inside in self._inside(start, stop)])

    def labels(self, start: int, stop: int) -> Tensor:
        return torch.cat([part.labels(*inside) for part, inside in self._inside(start, stop)])

    def count_labels(self) -> int:
        return sum(part.count_labels() for part in self._parts)

    def _inside(self, start: int, stop: int) -> Iterator[tuple[Context, tuple[int, int]]]:
        for part, begin in zip(self._parts, self._begins.tolist(), strict=False):
            first, last = (min(max(place - begin, 0), part.length) for place in (start, stop))
            yield part, (first, last)


class PackedContexts:
    """The contexts of the token files at `prefix`, by number: `contexts[i]`, i = 0, 1, 2, … without end.

    Each epoch has its own order of the documents, given by `seed` and the epoch's number; with shuffle=False each has
    the file's. A context may hold the end of one epoch and the beginning of the next. Raises ValueError if there are
    fewer tokens than one context has, and what `TokenFile` raises. With a `vocab_size` whoever reads a token that is
    not below it, or negative, gets a ValueError.
    """

    def __init__(
        self,
        prefix: str | Path,
        context_length: int,
        *,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.file = TokenFile(prefix)
        if not 1 <= context_length <= self.file.num_tokens:
            raise ValueError(
                f"context_length: got {context_length}, expected 1 to {self.file.num_tokens} "
                f"(all tokens of {self.file.bin_path})"
            )
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected at least 0")
        self.context_length, self.seed, self.shuffle = context_length, seed, shuffle
        self.vocab_size = vocab_size
        self._epoch = lru_cache(maxsize=2)(self._order)  # a context touches at most two
        self._places = lru_cache(maxsize=2)(self._permutation)

    @property
    def num_contexts(self) -> int:
        """Whole contexts in one epoch."""
        return self.file.num_tokens // self.context_length

    def one_epoch(self) -> Iterator[Context]:
        """The first epoch's whole contexts, once: for validation. A rest that is shorter than a context is left out."""
        return (self[index] for index in range(self.num_contexts))

    def documents(self, epoch: int) -> np.ndarray:
        """The numbers of the file's documents in an epoch's order, int64 [D]."""
        return self._epoch(epoch)[0]

    def __getitem__(self, index: int) -> Context:
        if index < 0:
            raise IndexError(f"index: got {index}, expected at least 0")
        return self.at(index * self.context_length, self.context_length)

    def shuffled(self, number: int, length: int) -> Context:
        """Number 0, 1, 2, … of the contexts of that length in a random order: each epoch has its own, of whole ones."""
        epoch, turn = divmod(number, self.file.num_tokens // length)
        return self.at(epoch * self.file.num_tokens + int(self._places(epoch, length)[turn]) * length, length)

    def _permutation(self, epoch: int, length: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, length]).permutation(self.file.num_tokens // length)

    def at(self, begin: int, length: int) -> Context:
        """The context of so many tokens from this place of the stream on."""
        end, parts = begin + length, []
        while begin < end:
            epoch, offset = divmod(begin, self.file.num_tokens)
            stop = min(end - epoch * self.file.num_tokens, self.file.num_tokens)
            parts.append(self._pieces(epoch, offset, stop))
            begin += stop - offset
        lengths, sources, ends = (np.concatenate(column) for column in zip(*parts, strict=True))
        tokens = self.file.tokens if self.vocab_size is None else VocabularyTokens(self.file, self.vocab_size)
        return Context(tokens, np.concatenate([[0], np.cumsum(lengths)]), sources, ends, self.file.mask)

    def _pieces(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces at start…stop of an epoch's stream: their lengths, places and documents' ends in the file."""
        order, starts = self._epoch(epoch)
        first, last = np.searchsorted(starts, start, side="right") - 1, np.searchsorted(starts, stop, side="left")
        low, high = np.maximum(starts[first:last], start), np.minimum(starts[first + 1 : last + 1], stop)
        filled = low < high  # not the empty documents that Megatron's format allows
        documents, ends_here = order[first:last][filled], starts[first + 1 : last + 1][filled]
        ends = self.file.document_starts[documents + 1]
        return (high - low)[filled], ends - (ends_here - low[filled]), ends

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, [D], and where they begin in its stream, [D + 1]."""
        order = np.arange(self.file.num_documents)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order, np.concatenate([[0], np.cumsum(np.diff(self.file.document_starts)[order])])


def local_batch(context: Context, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Tokens and labels, int64 [1, T] each, of the units that a rank owns, and nothing else is read.

    `ranges`: the units' (start, stop) positions in the context, in the rank's local order. Positions from the context's
    length on are padding: token 0, label -100.
    """
    tokens, labels = [], []
    for start, stop in ranges:
        if not 0 <= start <= stop:
            raise ValueError(f"ranges: got {(start, stop)}, expected 0 <= start <= stop")
        inside = min(start, context.length), min(stop, context.length)
        padding = (stop - start) - (inside[1] - inside[0])
        tokens += [context.tokens(*inside), torch.zeros(padding, dtype=torch.int64)]
        labels += [context.labels(*inside), torch.full((padding,), IGNORED)]
    return torch.cat(tokens)[None], torch.cat(labels)[None]


def labelled_places(labels: Tensor) -> Tensor | None:
    """int64 [N], which of the labels, flattened, are not -100, if those are fewer than half."""
    places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    return places if 2 * len(places) < labels.numel() else None
