"""Layer specs for Megatron's GPTModel."""

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lasp.config import LINEAR, require
from lasp.integrations.megatron.core_attention import SoftmaxCoreAttention
from lasp.integrations.megatron.experts import grouped
from lasp.integrations.megatron.norm import Norm
from lasp.integrations.megatron.pattern import check_config, layer_letters
from lasp.integrations.megatron.self_attention import OPTIONS, LinearSelfAttention
from lasp.integrations.megatron_weights import moe_layers

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16.1's router looks at it, but defines it only beside TransformerEngine


def gpt_layer_specs(
    config: Any,
    pattern: str = "LLLN",
    *,
    mixer: str = "gated_delta_net",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **mixer_options: Any,
) -> TransformerBlockSubmodules:
    """What GPTModel takes as `transformer_layer_spec`: this pipeline stage's layers, on local modules throughout.

    L layers are `LinearSelfAttention` of the kind `mixer`, N layers Megatron's SelfAttention around
    `SoftmaxCoreAttention`; which layers' MLPs are mixtures of experts, `moe_layer_freq` says, and with
    `moe_grouped_gemm` all experts of a layer are computed together. In checkpoints every layer is to stand under its
    own number, as they may be of several kinds: `config.hetereogenous_dist_checkpoint` is set.

    Args:
        config: the TransformerConfig that the model will have.
        pattern: letters L and N, repeated until there are `config.num_layers`.
        mixer: one of lasp.config.MIXERS.
        vp_stage, pp_rank: as GPTModel's; this process's own stage if None.
        mixer_options: `value_head_dim`, `conv_width`, `rope_theta` of LinearSelfAttention.

    Raises:
        ValueError: on every rank alike, for a configuration that the pattern does not fit, and other options.
    """
    check_config(config, mixer)
    letters = layer_letters(pattern, config.num_layers)
    moe = moe_layers(config, config.num_layers)
    config.hetereogenous_dist_checkpoint = True
    linear = linear_spec(mixer, mixer_options)
    if config.pipeline_model_parallel_layout is not None:
        layout = config.pipeline_model_parallel_layout
        mine = layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        mine = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))
    specs = [layer_spec(config, linear if letters[i] == LINEAR else None, moe[i]) for i in mine]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=Norm)


def linear_spec(mixer: str, options: dict[str, Any]) -> ModuleSpec:
    """`LinearSelfAttention` of that kind. Raises ValueError for options that it does not have."""
    unknown = sorted(options.keys() - set(OPTIONS))
    require(not unknown, "mixer_options", unknown, f"only {', '.join(OPTIONS)}")
    return ModuleSpec(module=LinearSelfAttention, params={"mixer": mixer, **options})


def layer_spec(config: Any, self_attention: ModuleSpec | None, moe: bool) -> ModuleSpec:
    """One TransformerLayer: with that self-attention, or with softmax attention if None."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    names = dict(spec.submodules.sharded_state_dict_keys_map)
    if self_attention is None:
        parts = spec.submodules.self_attention.submodules
        norms = {
            name: IdentityOp if getattr(parts, name) is IdentityOp else Norm for name in ("q_layernorm", "k_layernorm")
        }
        parts = replace(parts, core_attention=SoftmaxCoreAttention, **norms)
        self_attention = replace(spec.submodules.self_attention, submodules=parts)
    else:
        del names["input_layernorm."]  # there is no linear_qkv whose norm it could be
    submodules = replace(
        spec.submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        self_attention=self_attention,
        mlp=grouped(spec.submodules.mlp) if moe and config.moe_grouped_gemm else spec.submodules.mlp,
        sharded_state_dict_keys_map=names,
    )
    return replace(spec, submodules=submodules)
