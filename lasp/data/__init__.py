"""Token data: tokenizers, token files in Megatron's format, contexts of packed documents.

What this module has is loaded when it is asked for: texts become tokens without PyTorch, which takes longer to load
than many of them take.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lasp.data.bigram import bigram_loss
    from lasp.data.indexed import TokenFile, TokenFileWriter
    from lasp.data.mixture import Mixture, Numbered, mixed_fingerprint
    from lasp.data.packed import IGNORED, Context, Joined, PackedContexts, labelled_places, local_batch
    from lasp.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "Context",
    "Joined",
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
_HOMES = ("indexed", "tokenizer", "packed", "mixture", "bigram")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = import_module(f"lasp.data.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
