"""Whether the host has room for what waits there, before a run begins: what segments hand on to each other, and the
inputs of layers."""

import torch

from lasp.config import TrainConfig, require
from lasp.models.recompute import by_layer
from lasp.plan.host import available_bytes
from lasp.plan.memory import handed_on, inputs_on_host, pinned


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
    if config.segment_offload:
        sizes = config.context_length, sequence_parallel, config.segment_tokens, getattr(torch, config.dtype).itemsize
        waiting["segment_offload"] = int(sum(handed_on(config.model, *sizes, pinned).values()))
    needed, available = local_ranks * sum(waiting.values()), available_bytes()
    if available is not None:
        expected = f"False, or {needed / 2**30:.1f} GiB of the host's memory; it has {available / 2**30:.1f}"
        require(needed <= available, max(waiting, key=waiting.__getitem__), True, expected)
