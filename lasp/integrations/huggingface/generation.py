"""What `generate` may do with a lasp model."""

from typing import Any, NoReturn

from transformers import GenerationMixin

from lasp.config import require
from lasp.integrations.huggingface.cache import CACHE, RecurrentCache


class RecurrentGenerationMixin(GenerationMixin):
    """Greedy decoding, sampling and beams, with a RecurrentCache or without one; the rest raises ValueError."""

    _is_stateful = True  # Transformers refuses assisted decoding, which takes tokens back, for such models

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        assists = bool(getattr(generation_config, "is_assistant", False))
        require(not assists, "assistant_model", type(self).__name__, "a model whose cache can be rolled back")
        implementation = generation_config.cache_implementation
        require(implementation in (None, "dynamic"), "cache_implementation", implementation, "None: a RecurrentCache")
        mask = model_kwargs.get("attention_mask")
        padded_right = mask is not None and not bool(mask[:, -1].all())
        require(not padded_right, "attention_mask", "padding on the right", "padding on the left, to go on from a text")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = RecurrentCache()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("init_continuous_batching: got a call, expected none: its paged cache holds keys and values")


def cache_for(given: Any, renamed: Any, wanted: bool, rows: int) -> RecurrentCache | None:
    """The cache of a forward pass over so many rows, from its two names, or a new one."""
    require(given is None or renamed is None or given is renamed, "past_key_values", "another cache", "one cache")
    cache = given if renamed is None else renamed
    if cache is None:
        return RecurrentCache() if wanted else None
    require(isinstance(cache, RecurrentCache), CACHE, type(cache).__name__, "a RecurrentCache")
    require(cache.rows in (0, rows), CACHE, f"{cache.rows} rows", f"{rows}, as the batch has")
    return cache
