"""The commands that texts alone are needed for, as in lasp.commands. They do without PyTorch, which loads slowly."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lasp.config import require
from lasp.data.sources import SUFFIXES
from lasp.data.tokenizer import BYTE
from lasp.training.paths import TOKENIZER_FILE


def prepare(
    inputs: Positional[tuple[str, ...]],
    output: str,
    tokenizer: str = "byte",
    eod: str | None = None,
    text_field: str = "text",
    suffixes: tuple[str, ...] = SUFFIXES,
    valid_fraction: float = 0.05,
    chat: bool = False,
    folders: bool = False,
) -> None:
    """Turn texts into token files: plain text, JSON Lines, parquet, saved data sets; compressed or not.

    Args:
        inputs: files, folders, or the word "stdlib": the source text of Python's standard library.
        output: path prefix; the files are PREFIX_train and PREFIX_valid, .bin and .idx each.
        tokenizer: "byte", the path of a Hugging Face tokenizer.json, or what Transformers' AutoTokenizer knows: a name
            or a folder; that is written to PREFIX_tokenizer, for --data.tokenizer.
        eod: the tokenizer's end-of-document token; found by its usual names if not given.
        text_field: of a record (a line of JSON Lines, a row), the field that is its document.
        suffixes: of the files that are read in folders.
        valid_fraction: the part of the documents that is held out.
        chat: records hold conversations, "messages", or "prompt" and "completion"; only what the assistant says, or
            the completion, has a loss. Messages go through the chat template of the tokenizer's directory.
        folders: the texts of a folder are one document, each after a line with its file's name.
    """
    from lasp.data.prepare import prepare

    tokenizer = _found_tokenizer(tokenizer, f"{output}_tokenizer")
    settings: dict[str, Any] = {
        "text_field": text_field,
        "suffixes": suffixes,
        "valid_fraction": valid_fraction,
        "folders": folders,
    }
    print(prepare(inputs, output, tokenizer, eod=eod, chat=(lambda: _chat(tokenizer)) if chat else None, **settings))


def tokenizer(
    inputs: Positional[tuple[str, ...]],
    output: str,
    vocab_size: int = 32_768,
    text_field: str = "text",
    suffixes: tuple[str, ...] = SUFFIXES,
    characters: int | None = None,
) -> None:
    """Train a tokenizer of one's own (byte-level BPE) on texts, the same as `lasp prepare` reads.

    Args:
        inputs: files, folders, or the word "stdlib".
        output: the tokenizer.json to write.
        vocab_size: tokens, the end of a document included.
        text_field: of a record, the field that is its document.
        suffixes: of the files that are read in folders.
        characters: of longer texts every n-th part is read, about so many characters.
    """
    from lasp.data.bpe import train_on

    settings: dict[str, Any] = {"text_field": text_field, "suffixes": suffixes, "characters": characters}
    print(train_on(inputs, output, vocab_size, **settings))


def _found_tokenizer(name: str, folder: str) -> str:
    """The same, or where it is written if only Transformers can find it."""
    by_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()
    without_file = Path(name).is_dir() and not Path(name, TOKENIZER_FILE).is_file()
    if name == BYTE or name.endswith(".json") or not (by_name or without_file):
        return name
    require_transformers()
    from lasp.integrations.huggingface.tokenizer import save_tokenizer

    print(f"tokenizer: {save_tokenizer(name, folder)}")
    return folder


def _chat(tokenizer: str) -> Any:
    require_transformers()
    from lasp.integrations.huggingface.chat import HuggingFaceChat

    return HuggingFaceChat(tokenizer)


def require_transformers() -> None:
    found = find_spec("transformers") is not None
    require(found, "transformers", "nothing of that name", "lasp's extra: pip install 'lasp-sp[huggingface]'")
