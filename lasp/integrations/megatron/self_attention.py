"""lasp's mixers in the place of Megatron's self-attention."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from lasp.config import ModelConfig, require
from lasp.integrations.megatron.sequence import context_parallel
from lasp.integrations.megatron.tensor_parallel import enter, leave, partition_dim, split_over_heads
from lasp.models.memory import RememberingOps
from lasp.models.mixers import make_mixer

OPTIONS = ("value_head_dim", "conv_width", "rope_theta")  # what a LinearSelfAttention is told besides its mixer


class LinearSelfAttention(MegatronModule):
    """A linear-attention layer for `TransformerLayerSubmodules.self_attention`: [s, b, h] -> ([s, b, h], no bias).

    It is the mixer of lasp's own models with Megatron's heads (`num_attention_heads` of `kv_channels`): over
    tensor-parallel ranks each has a share of the heads, over context-parallel ranks of the tokens. Positions come from
    the batch, so that Megatron's rotary embedding is not used; a mask is not needed. Generation works with a static
    inference context, in which the layer keeps its state.

    Args:
        mixer: one of lasp.config.MIXERS.
        value_head_dim: value size of a head; `kv_channels` if None.
        conv_width: of mixers with a short convolution.
        rope_theta: of mixers that rotate q and k themselves (retention).

    Raises:
        ValueError: heads that the tensor-parallel group cannot share, or an unknown mixer.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        mixer: str,
        value_head_dim: int | None = None,
        conv_width: int = 4,
        rope_theta: float = 500_000.0,
        pg_collection: Any = None,
        **kwargs: Any,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.context = context_parallel(pg_collection.cp)
        heads, ranks = config.num_attention_heads, self.tp_group.size()
        require(heads % ranks == 0, "num_attention_heads", heads, f"a multiple of tensor_model_parallel_size={ranks}")

        def make(share: int) -> nn.Module:
            shape = ModelConfig(
                vocab_size=1,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                num_heads=share,
                head_dim=config.kv_channels,
                value_head_dim=value_head_dim,
                intermediate_size=1,
                pattern="L",
                mixer=mixer,
                conv_width=conv_width,
                rope_theta=rope_theta,
                norm_eps=config.layernorm_epsilon,
            )
            made = make_mixer(shape, layer_number - 1)
            if config.perform_initialization:
                _initialise(made, config.init_method, config.output_layer_init_method)
            return made

        self.mixer = split_over_heads(make, heads, self.tp_group, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [s, b, h] of this rank; for packed batches b = 1. Megatron's other arguments are not used."""
        x = enter(hidden_states, self.config.sequence_parallel, self.tp_group)
        seq: Any = self.context.sequence(x.shape[0], packed_seq_params)
        if inference_context is not None:
            seq = self._remembering(seq, inference_context, packed_seq_params)
        y = self.mixer(x.transpose(0, 1), seq)
        return leave(y.transpose(0, 1).contiguous(), self.config.sequence_parallel, self.tp_group), None

    def _remembering(self, seq: Any, inference_context: Any, packed: Any) -> RememberingOps:
        static = inference_context.is_static_batching()
        require(static, "inference_context", type(inference_context).__name__, "a StaticInferenceContext")
        require(packed is None, "packed_seq_params", "a packed batch", "None in generation")
        require(self.context.size == 1, "context_parallel_size", self.context.size, "1 in generation")
        first = inference_context.batch_size_offset
        require(first == 0, "inference_context.batch_size_offset", first, "0: one batch at a time")
        seen = inference_context.sequence_len_offset
        states = inference_context.key_value_memory_dict
        if seen == 0:
            states[self.layer_number] = []
        return RememberingOps(seq, states[self.layer_number], seen)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, tp_group: Any = None
    ) -> dict:
        """For `megatron.core.dist_checkpointing`; loads with any other tensor- and context-parallel size."""
        state = self.mixer.state_dict(keep_vars=True)
        dims = {name: partition_dim(name) for name in state}
        return make_sharded_tensors_for_checkpoint(
            state,
            f"{prefix}mixer.",
            {name: dim for name, dim in dims.items() if dim is not None},
            sharded_offsets,
            tp_group=tp_group or self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


@torch.no_grad()
def _initialise(mixer: nn.Module, matrices: Callable[[Tensor], Any], output: Callable[[Tensor], Any]) -> None:
    """Matrices as the configuration says; gates, convolutions and decays as lasp's models do."""
    for name, module in mixer.named_modules():
        if isinstance(module, nn.Linear):
            (output if name.endswith("out_proj") else matrices)(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif hasattr(module, "init_parameters"):
            module.init_parameters(None)
