"""Llama's weights in lasp's decoders: to begin a Linear-Llama from a Llama (LASP-2, arXiv:2502.07563), and back.

Softmax layers are copied whole, as are embeddings, norms, MLPs and the head: a decoder of pattern "N" computes what the
Llama does. A linear layer takes q, k, v and o; a group's k and v heads are repeated for each of its q heads, since
linear layers have as many of all three, and for each of several steps of a token; a window of softmax attention beside
it takes them as they are. What a Llama has nothing for keeps its fresh values: gates, decays, feature maps, short
convolutions, norms of heads; hgrn2's k (a forget gate there); Mamba-2's B and C (k and q, but one for all heads).
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lasp.config import SOFTMAX, ModelConfig, require
from lasp.models import Decoder
from lasp.models.mixers import DeltaProductMixer, LinearMixer, Mamba2Mixer, SoftmaxMixer, WithWindow

_FIELDS = {  # of a model's shape; our name: Llama's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}


def llama_shape(llama: LlamaConfig, **linear: Any) -> ModelConfig:
    """The configuration of a decoder in a Llama's shape, softmax layers only unless told otherwise.

    linear: the fields of `ModelConfig` that say what its layers become: pattern, mixer, feature_map, window. Raises
    ValueError for a Llama that lasp cannot express, and for a mixer of one's own.
    """
    require(llama.hidden_act == "silu", "hidden_act", llama.hidden_act, "silu")
    for field in ("attention_bias", "mlp_bias"):
        require(not getattr(llama, field), field, getattr(llama, field), "False")
    rope: Any = llama.rope_parameters
    same: dict[str, Any] = {ours: getattr(llama, theirs) for ours, theirs in _FIELDS.items()}
    shape = ModelConfig(**same, rope_theta=rope["rope_theta"], **{"pattern": SOFTMAX, **linear})
    require(not shape.is_own, "mixer", shape.mixer, "one of lasp's")
    rotates = shape.attending > 0 or shape.mixer == "retention"
    require(not rotates or rope["rope_type"] == "default", "rope_type", rope["rope_type"], "default (no scaling)")
    return shape


@torch.no_grad()
def from_llama(llama: LlamaForCausalLM, **linear: Any) -> Decoder:
    """A new decoder with the Llama's weights, in its dtype. Arguments and errors are those of `llama_shape`."""
    decoder = Decoder(llama_shape(llama.config, **linear)).to(llama.dtype)
    weights = llama.state_dict()
    for name, place in _places(decoder):
        weight = weights[name].view(-1, *place.shape[1:])
        place.copy_(weight.repeat_interleave(place.shape[0] // weight.shape[0], dim=0))
    return decoder


@torch.no_grad()
def to_llama(decoder: Decoder, **fields: Any) -> LlamaForCausalLM:
    """A Llama with a softmax decoder's weights; `fields` are more of its configuration's. Raises ValueError for a
    model of one's own, linear layers, experts, or softmax layers without positions."""
    shape = decoder.config
    require(shape.model_class is None, "model_class", shape.model_class, "None: a Llama is no model of one's own")
    require(set(shape.layers) == {SOFTMAX}, "pattern", shape.pattern, f"only {SOFTMAX}: a Llama has no linear layers")
    require(shape.num_experts == 0, "num_experts", shape.num_experts, "0: a Llama has no experts")
    require(shape.rope_theta is not None, "rope_theta", None, "a number: a Llama has RoPE")
    same: dict[str, Any] = {theirs: getattr(shape, ours) for ours, theirs in _FIELDS.items()}
    same |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.key_dim}  # where shape leaves them open
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config = LlamaConfig(**same, rope_parameters=rope, dtype=next(decoder.parameters()).dtype, **fields)
    llama: Any = LlamaForCausalLM(config)
    llama.to(config.dtype)
    weights = llama.state_dict()
    for name, place in _places(decoder):
        weights[name].view(place.shape).copy_(place)
    return llama


def _places(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Llama's name of each weight, and where the decoder holds it; of q, k and v with the heads as first dimension."""
    yield "model.embed_tokens.weight", decoder.embedding.weight
    yield "model.norm.weight", decoder.norm.weight
    if decoder.head is not None:
        yield "lm_head.weight", decoder.head.weight
    block: Any
    for index, block in enumerate(decoder.layers):
        layer = f"model.layers.{index}"
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        yield f"{layer}.input_layernorm.weight", block.mixer_norm.weight
        yield f"{layer}.post_attention_layernorm.weight", block.mlp_norm.weight
        yield f"{layer}.mlp.gate_proj.weight", gate
        yield f"{layer}.mlp.up_proj.weight", up
        yield f"{layer}.mlp.down_proj.weight", block.mlp.out_proj.weight
        mixers = [block.mixer.linear, block.mixer.window] if isinstance(block.mixer, WithWindow) else [block.mixer]
        for name, place in chain.from_iterable(map(_mixer_places, mixers)):
            yield f"{layer}.self_attn.{name}_proj.weight", place


def _mixer_places(mixer: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(mixer, SoftmaxMixer):
        heads = mixer.qkv_proj.weight.unflatten(0, (sum(mixer.head_counts), -1))
        yield from zip("qkv", heads.split(mixer.head_counts), strict=True)
        yield "o", mixer.out_proj.weight
    elif isinstance(mixer, Mamba2Mixer):
        yield "v", mixer.xbc_proj.weight[: mixer.sizes[0]].unflatten(0, (mixer.heads, -1))
        yield "o", mixer.out_proj.weight
    else:
        heads = mixer.qkv_proj.weight.unflatten(0, (mixer.heads, -1))
        for name, place in zip("qkv", heads.split(mixer.sizes, dim=1), strict=True):
            if not (name == "k" and isinstance(mixer, LinearMixer) and mixer.kind.keys_from_decay):
                steps = mixer.steps if isinstance(mixer, DeltaProductMixer) and name != "q" else 1
                yield from ((name, each) for each in place.chunk(steps, dim=1))
        yield "o", mixer.output.out_proj.weight
