"""Token data: tokenizers, token files in Megatron's format, contexts of packed documents."""

from lasp.data.bigram import bigram_loss
from lasp.data.indexed import TokenFile, TokenFileWriter
from lasp.data.mixture import Mixture, Numbered, mixed_fingerprint
from lasp.data.packed import IGNORED, Context, PackedContexts, labelled_places, local_batch
from lasp.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "Context",
    "Mixture",
    "Numbered",
    "PackedContexts",
    "TokenFile",
    "TokenFileWriter",
    "Tokenizer",
    "bigram_loss",
    "labelled_places",
    "load_tokenizer",
    "local_batch",
    "mixed_fingerprint",
]
