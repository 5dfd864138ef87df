"""Layer specs for Megatron's HybridModel (megatron-core 0.19), whose patterns name every mixer and MLP by a letter."""

from dataclasses import replace
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from lasp.config import LINEAR, require
from lasp.integrations.megatron.gpt import layer_spec, linear_spec
from lasp.integrations.megatron.norm import Norm
from lasp.integrations.megatron.pattern import check_config, layer_letters
from lasp.integrations.megatron_weights import moe_layers

_SYMBOLS = "G*-E"  # linear and softmax attention, MLP, mixture of experts


class LocalHybridStack(HybridStack):
    """HybridStack whose last norm is local, too."""

    def __init__(self, config: Any, *args: Any, post_layer_norm: bool = True, **kwargs: Any):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)


def hybrid_pattern(config: Any, pattern: str = "LLLN") -> str:
    """HybridModel's pattern: G for L, * for N, each followed by its MLP (-) or experts (E); | between stages.

    Args:
        config: with `num_layers` counting symbols, two for each letter; `moe_layer_freq` counts letters.

    Raises:
        ValueError: a pattern that does not fit the layers, or that the pipeline cannot split between two letters.
    """
    require(
        config.num_layers % 2 == 0, "num_layers", config.num_layers, "an even number: a mixer and an MLP per letter"
    )
    letters = layer_letters(pattern, config.num_layers // 2)
    moe = moe_layers(config, len(letters))
    layers = [("G" if c == LINEAR else "*") + ("E" if e else "-") for c, e in zip(letters, moe, strict=True)]
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    expected = f"twice a multiple of the {stages} pipeline stages (virtual ones included)"
    require(len(layers) % stages == 0, "num_layers", config.num_layers, expected)
    share = len(layers) // stages
    return "|".join("".join(layers[i : i + share]) for i in range(0, len(layers), share))


def hybrid_stack_spec(config: Any, pattern: str, *, mixer: str = "gated_delta_net", **mixer_options: Any) -> ModuleSpec:
    """What HybridModel takes as `hybrid_stack_spec`, on local modules throughout.

    Args:
        config: the TransformerConfig that the model will have.
        pattern: HybridModel's own `hybrid_layer_pattern`, of G (`LinearSelfAttention` of the kind `mixer`), * (softmax
            attention), - (MLP), E (mixture of experts) and |; `hybrid_pattern` makes one.
        mixer, mixer_options: as in `gpt_layer_specs`.

    Raises:
        ValueError: on every rank alike, for other symbols or a configuration that they do not fit.
    """
    check_config(config, mixer)
    layers = pattern.replace("|", "")
    require(bool(layers) and set(layers) <= set(_SYMBOLS), "pattern", pattern, f"symbols {', '.join(_SYMBOLS)} and |")
    require(len(layers) == config.num_layers, "num_layers", config.num_layers, f"the pattern's {len(layers)}")
    stages, pp = pattern.count("|") + 1, config.pipeline_model_parallel_size
    require(stages % pp == 0, "pattern", pattern, f"a multiple of pipeline_model_parallel_size={pp} stages")
    require("E" not in layers or config.num_moe_experts is not None, "num_moe_experts", None, "a number: there is an E")
    attention = linear_spec(mixer, mixer_options)
    parts = HybridStackSubmodules(
        gdn_layer=_without_mlp(layer_spec(config, attention, False)),
        attention_layer=_without_mlp(layer_spec(config, None, False)),
        mlp_layer=_mlp_only(layer_spec(config, None, False), MLPLayer),
        moe_layer=_mlp_only(layer_spec(config, None, True), MoETransformerLayer) if "E" in layers else IdentityOp,
    )
    return ModuleSpec(module=LocalHybridStack, submodules=parts)


def _without_mlp(spec: ModuleSpec) -> ModuleSpec:
    parts = replace(spec.submodules, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    return replace(spec, submodules=parts)


def _mlp_only(spec: ModuleSpec, module: type) -> ModuleSpec:
    parts = replace(
        spec.submodules, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp
    )
    return replace(spec, module=module, submodules=parts)
