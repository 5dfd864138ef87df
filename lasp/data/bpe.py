"""Tokenizers of one's own: byte-level BPE (arXiv:1508.07909), trained by the `tokenizers` library."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lasp.config import require
from lasp.data.documents import Skipped
from lasp.data.sources import SUFFIXES, find_sources
from lasp.data.tokenizer import USUAL_EOD
from lasp.data.words import OWN

EOD = USUAL_EOD[0]


def train_tokenizer(texts: Iterator[str], output: str | Path, vocab_size: int) -> None:
    """Writes a tokenizer.json of the texts' most frequent pieces; EOD, the end of a document, is its first token.

    Any text is encoded, and its tokens give it back. Raises ValueError for fewer tokens than bytes and EOD take, or for
    texts that do not have as many pieces.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    require(vocab_size > len(alphabet), "vocab_size", vocab_size, f"more than {len(alphabet)}: the bytes and {EOD}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(OWN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    require(found == vocab_size, "vocab_size", vocab_size, f"at most {found}, all pieces that the texts have")
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    tokenizer.save(str(unfinished))
    unfinished.replace(path)


def train_on(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    text_field: str = "text",
    suffixes: Sequence[str] = SUFFIXES,
    characters: int | None = None,
) -> str:
    """The same from the inputs of `prepare`, from every n-th part of their texts if there are more than `characters`;
    returns a line about it."""
    skipped = Skipped()
    sources = find_sources(inputs, suffixes, skipped)

    def parts() -> Iterator[str]:
        for source in sources:
            for document in source.documents(text_field, Skipped()):
                yield from document.parts

    every = 1
    if characters is not None:
        every = -(-sum(map(len, parts())) // characters)
    train_tokenizer((part for number, part in enumerate(parts()) if number % every == 0), output, vocab_size)
    some = "" if every == 1 else f", from one in {every} parts of {len(sources):,} files"
    return f"{output}: {vocab_size:,} tokens{some}"
