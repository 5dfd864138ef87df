"""Drop-ins for `SelfAttentionSubmodules.core_attention`: softmax and linear attention on local layers, with CP.

Megatron's projections, rotary embedding, grouped keys and values, and checkpoints stay as they are. As with
TransformerEngine's causal kernels, `attention_mask` is not read: attention is causal, within each document of a packed
batch.
"""

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lasp.config import ModelConfig, require
from lasp.integrations.megatron.sequence import context_parallel
from lasp.integrations.megatron.tensor_parallel import FixedDecay, mark
from lasp.kernels import linear_attention, softmax_attention
from lasp.models.layers import RMSNorm
from lasp.models.mixers.linear import LINEAR_KINDS

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class _CoreAttention(MegatronModule):
    """q [s, b, H, K], k and v [s, b, groups, K] -> [s, b, H · K]; packed batches without b. Heads are this rank's.

    Raises:
        ValueError: what neither drop-in computes (attention dropout, windows, sinks, a mask that is not causal).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: Any = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        require(dropout == 0, "attention_dropout", dropout, "0")
        require(attention_type == "self", "attention_type", attention_type, "'self'")
        require(attn_mask_type in _CAUSAL, "attn_mask_type", attn_mask_type, "causal or padding_causal")
        require(config.window_size is None, "window_size", config.window_size, "None")
        sinks = getattr(config, "softmax_type", "vanilla")
        require(sinks == "vanilla", "softmax_type", sinks, "'vanilla'")
        self.layer_number, self.scale = layer_number, softmax_scale
        self.tp_group = pg_collection.tp
        self.context = context_parallel(pg_collection.cp)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if attention_bias is not None:
            raise ValueError("attention_bias: got a tensor, expected None")
        packed = query.ndim == 3
        if packed:
            query, key, value = (x[:, None] for x in (query, key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if k.shape[1] == q.shape[1]:
            o = self.attend(q, k, v, self.context.sequence(q.shape[1], packed_seq_params))
        else:  # generation: keys and values of all tokens so far, queries of the last ones
            size = self.context.size
            require(size == 1, "context_parallel_size", size, "1 in generation")
            o = self.attend_last(q, k, v)
        o = o.transpose(0, 1).flatten(2)
        return o[:, 0] if packed else o

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Any) -> Tensor:
        """[b, s, H, V], in lasp's order of dimensions, as everything here."""
        raise NotImplementedError

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, s, H, V] where the s queries are the last of more keys."""
        raise NotImplementedError


class SoftmaxCoreAttention(_CoreAttention):
    """Causal softmax attention; ring attention over context-parallel ranks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Any) -> Tensor:
        return seq.softmax_attention(q, k, v, scale=self.scale)

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, scale=self.scale)[0]


class LinearCoreAttention(_CoreAttention):
    """Linear attention whose state decays at constant rates, if at all, and an RMSNorm of every head's output.

    Args:
        kind: "linear", "lightning" or "retention": the features and the decay of that mixer, without its output gate.
    """

    KINDS = ("linear", "lightning", "retention")

    def __init__(self, config: Any, layer_number: int, *args: Any, kind: str, **kwargs: Any):
        super().__init__(config, layer_number, *args, **kwargs)
        require(kind in self.KINDS, "kind", kind, f"one of {', '.join(self.KINDS)}")
        self.kind = LINEAR_KINDS[kind]
        self.decay = None
        if self.kind.decay is not None:
            heads, ranks = config.num_attention_heads, self.tp_group.size()
            shape = ModelConfig(
                vocab_size=1,
                hidden_size=heads * config.kv_channels,
                num_layers=config.num_layers,
                num_heads=heads,
                intermediate_size=1,
                pattern="L",
            )
            whole: Any = self.kind.decay(shape, layer_number - 1)
            self.decay = FixedDecay(whole.values(heads).chunk(ranks)[self.tp_group.rank()])
        self.norm = RMSNorm(config.kv_channels, eps=config.layernorm_epsilon).to(config.params_dtype)
        if self.tp_group.size() > 1:
            mark(self.norm.weight, None, self.tp_group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seq: Any) -> Tensor:
        return self._attend(q, k, v, seq.linear_attention)

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = q.new_zeros(q.shape[0], k.shape[1] - q.shape[1], *q.shape[2:])
        return self._attend(torch.cat([past, q], dim=1), k, v, linear_attention)[:, past.shape[1] :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, op: Any) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        decay = self.decay(q) if self.decay is not None else None
        o, _ = op(self.kind.features(q), self.kind.features(k), v, decay, scale=self.scale)
        return self.norm(o)
