"""lasp's memory with what `generate` asks of a cache."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lasp.models import Memory

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name there


class RecurrentCache(Memory):
    """A memory of the rows of a batch. Its size grows in softmax layers only.

    Transformers counts columns, padding included; a memory knows only the tokens in them.

    seen: [B, columns] bool, where tokens were; None as long as that is everywhere.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """As new."""
        self.slots, self.tokens = {}, 0
        self.columns = self.rows = 0
        self.seen: Tensor | None = None

    def record(self, valid: Tensor) -> None:
        """The model has seen the tokens in these columns [B, T]."""
        if self.seen is not None or not valid.all():
            before = valid.new_ones(valid.shape[0], self.columns) if self.seen is None else self.seen
            self.seen = torch.cat([before, valid], dim=1)
        self.rows = valid.shape[0]
        self.columns += valid.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what was row beam_idx[i] (beam search)."""
        self.select(beam_idx)
        self.rows = len(beam_idx)
        if self.seen is not None:
            self.seen = self.seen[beam_idx.to(self.seen.device)]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes so many."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def batch_size(self) -> int:
        return self.rows or -1

    @property
    def is_linear(self) -> list[bool]:
        """Nowhere: `generate` hands whole texts to a cache of linear layers alone, and the new tokens to any other."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # none

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.columns > 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            _refuse("crop", "a recurrent state cannot forget its last tokens: copy the cache before them")

    def activate_past_recording(self) -> None:
        _refuse("activate_past_recording", "a recurrent state cannot be rolled back (assisted decoding)")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("update", "a RecurrentCache is updated by lasp's models alone")


def _refuse(method: str, reason: str) -> NoReturn:
    raise ValueError(f"cache: got a call of {method}, expected none: {reason}")
