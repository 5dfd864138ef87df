"""The tokenizer of a run as one of Transformers'."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lasp.config import require
from lasp.data import load_tokenizer
from lasp.data.tokenizer import BYTE

END_OF_BYTES = "<|endoftext|>"
USUAL_PAD = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<|finetune_right_pad_id|>")


def export_tokenizer(name: str) -> Any:
    """What `load_tokenizer(name)` reads, for Transformers: the same ids, with tokens named for the end and for padding.

    What lies beside a tokenizer.json (names of special tokens, a chat template) is kept.
    """
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    settings: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    if name == BYTE:
        settings |= {"padding_side": "left", "clean_up_tokenization_spaces": False}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_bytes(), eos_token=END_OF_BYTES, **settings)
    elif (path.is_dir() or path.name == "tokenizer.json") and (folder / "tokenizer_config.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), **settings)
    else:
        file = path / "tokenizer.json" if path.is_dir() else path
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), padding_side="left", **settings)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(load_tokenizer(name).eod)
    if tokenizer.pad_token is None:
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((pad for pad in USUAL_PAD if pad in known), tokenizer.eos_token)
    return tokenizer


def save_tokenizer(name: str, folder: str) -> str:
    """Writes the tokenizer that Transformers knows by that name, or finds in that folder, as one with a tokenizer.json.

    Raises ValueError for what it does not know, or has no such form of.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        expected = "'byte', the path of a tokenizer.json, or a tokenizer that Transformers finds"
        raise ValueError(f"tokenizer: got {name!r} ({first}), expected {expected}") from error
    require(tokenizer.is_fast, "tokenizer", name, "one that can be a tokenizer.json")
    tokenizer.save_pretrained(folder)
    return folder


def _bytes() -> Tokenizer:
    """lasp's byte tokenizer: ids 0 to 255 are the bytes of the text, 256 is its end."""
    names = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_BYTES])
    return tokenizer
