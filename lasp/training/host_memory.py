"""Whether the host has room for what waits there, before a run begins: what segments hand on to each other, and the
inputs of layers."""

import torch

from lasp.config import LINEAR, SOFTMAX, ModelConfig, TrainConfig, require
from lasp.models.recompute import by_layer
from lasp.plan.host import available_bytes
from lasp.plan.memory import inputs_on_host


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


def waiting_inputs_bytes(config: TrainConfig, ranks: int) -> int:
    """What layers that are computed again leave there on each rank: their inputs, of all segments that are computed
    once."""
    model, policy, number = config.model, config.recompute, 1
    if not config.offload_activations or model.is_own:
        return 0
    tokens = config.context_length
    if config.segment_tokens is not None:
        number = min(config.segment_graphs or 1, -(-tokens // config.segment_tokens))
        tokens = min(tokens, config.segment_tokens)
    policies = by_layer(policy, config.recompute_layers, model.layers)  # type: ignore[arg-type]
    one = model.local_tokens(tokens, ranks) * model.hidden_size * getattr(torch, config.dtype).itemsize
    return int(inputs_on_host(one, policies, number))


def require_host_memory(config: TrainConfig, sequence_parallel: int, local_ranks: int) -> None:
    """Raises ValueError if this machine's memory is not enough for what all of its ranks leave there, where that is
    known. recompute: settled."""
    waiting = {"offload_activations": waiting_inputs_bytes(config, sequence_parallel), "segment_offload": 0}
    if config.segment_tokens is not None and config.segment_offload:
        sizes = config.context_length, config.segment_tokens, sequence_parallel
        waiting["segment_offload"] = handed_on_bytes(config.model, *sizes, getattr(torch, config.dtype))
    needed, available = local_ranks * sum(waiting.values()), available_bytes()
    if available is not None:
        expected = f"False, or {needed / 2**30:.1f} GiB of the host's memory; it has {available / 2**30:.1f}"
        require(needed <= available, max(waiting, key=waiting.__getitem__), True, expected)
