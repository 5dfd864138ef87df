"""Hugging Face Transformers: lasp's decoders as a model class of theirs. Needs lasp's extra `huggingface`.

Importing this package registers the classes, so that

    AutoModelForCausalLM.from_pretrained(directory)

loads what `to_huggingface(decoder).save_pretrained(directory)` wrote. Weights keep lasp's names and layout behind the
prefix `decoder.`, so that nothing is rounded or permuted on the way. What of Transformers' conventions is honoured, and
what refused: docs/huggingface.md.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from lasp.integrations.huggingface.cache import CACHE, RecurrentCache
from lasp.integrations.huggingface.config import LaspConfig
from lasp.integrations.huggingface.model import LaspForCausalLM, to_huggingface

AutoConfig.register(LaspConfig.model_type, LaspConfig, exist_ok=True)
AutoModelForCausalLM.register(LaspConfig, LaspForCausalLM, exist_ok=True)

__all__ = ["CACHE", "LaspConfig", "LaspForCausalLM", "RecurrentCache", "to_huggingface"]
