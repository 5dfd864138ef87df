"""lasp's layers in Megatron-Core models. Importing this needs megatron-core; nothing else of lasp does."""

from lasp.integrations.megatron.core_attention import LinearCoreAttention, SoftmaxCoreAttention
from lasp.integrations.megatron.cpu import run_on_cpu
from lasp.integrations.megatron.gpt import gpt_layer_specs
from lasp.integrations.megatron.self_attention import LinearSelfAttention
from lasp.integrations.megatron.sequence import leave_mesh, shard_batch

__all__ = [
    "LinearCoreAttention",
    "LinearSelfAttention",
    "SoftmaxCoreAttention",
    "gpt_layer_specs",
    "leave_mesh",
    "run_on_cpu",
    "shard_batch",
]
