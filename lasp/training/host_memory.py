"""Whether the host has room for what segments hand on to each other, before a run begins."""

import torch

from lasp.config import LINEAR, SOFTMAX, ModelConfig, TrainConfig, require
from lasp.plan.host import available_bytes


def handed_on_bytes(model: ModelConfig, tokens: int, segment_tokens: int, ranks: int, dtype: torch.dtype) -> int:
    """What waits on each rank, at most, in one step on a context of so many tokens.

    States for each linear layer and cut between segments; for each softmax layer the keys and values of this rank's
    tokens, their gradients, and what its queries saw. Tails of convolutions, a few percent of the states, do not count.
    """
    narrow, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    cuts = -(-tokens // segment_tokens) - 1
    state = model.states(tokens) * model.num_heads * model.key_dim * model.value_dim * wide
    keys = 2 * model.kv_heads * model.key_dim * (narrow + wide)
    seen = model.num_heads * (model.key_dim * narrow + wide)
    return model.layers.count(LINEAR) * cuts * state + model.layers.count(SOFTMAX) * -(-tokens // ranks) * (keys + seen)


def require_host_memory(config: TrainConfig, sequence_parallel: int, local_ranks: int) -> None:
    """Raises ValueError if this machine's memory is not enough for all of its ranks' segments, where that is known."""
    if config.segment_tokens is None or not config.segment_offload:
        return
    sizes = config.context_length, config.segment_tokens, sequence_parallel
    needed = local_ranks * handed_on_bytes(config.model, *sizes, getattr(torch, config.dtype))
    available = available_bytes()
    if available is not None:
        expected = f"False, or {needed / 2**30:.1f} GiB of the host's memory; it has {available / 2**30:.1f}"
        require(needed <= available, "segment_offload", True, expected)
