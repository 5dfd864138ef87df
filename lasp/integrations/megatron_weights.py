"""Weights between lasp's decoders and checkpoints of Megatron-Core's GPTModel with lasp's layers.

Works on directories of `megatron.core.dist_checkpointing` (PyTorch's distributed checkpoints with a note beside them),
on one process and without Megatron-Core. What a Megatron run saved on any mesh can be read, and any mesh can load what
is written: by `Run.initial_weights`, or by `dist_checkpointing.load` without the entries `_extra_state`.

Linear mixers are the same modules on both sides. Elsewhere names differ, and:

    embedding, head    Megatron pads the vocabulary to a multiple of 128 (here with zeros: in its softmax they are
                       logits of 0), and has a head even if ours is the embedding
    softmax layers     Megatron's q, k, v rows go group by group: the queries of a key head, the key, the value
    Mamba-2            what heads have of their own (x) and what they share (B, C) are two tensors there, one here
    experts            Megatron stores the transposed matrices
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lasp.config import SOFTMAX, ModelConfig, require, require_empty
from lasp.integrations.output import new_directory
from lasp.models import Decoder, count_parameters
from lasp.training import checkpoint, storage

VOCABULARY_MULTIPLE = 128
SHAPE_FILE = "lasp.json"  # in a checkpoint: the ModelConfig of its weights
_NOTE = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_FIELDS = {  # of a model's shape; our name: TransformerConfig's
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "norm_eps": "layernorm_epsilon",
    "init_std": "init_method_std",
}
_PARTS = {  # of a layer; our name: Megatron's
    "mlp_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.gate_up_proj.weight": "mlp.linear_fc1.weight",
    "mlp.out_proj.weight": "mlp.linear_fc2.weight",
    "mlp.router.proj.weight": "mlp.router.weight",
    "mlp.router.bias": "mlp.router.expert_bias",
    "mlp.experts.gate_up_proj": "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.out_proj": "mlp.experts.experts.linear_fc2.weight",
}
_SOFTMAX_PARTS = {
    "mixer_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "mixer.qkv_proj.weight": "self_attention.linear_qkv.weight",
    "mixer.out_proj.weight": "self_attention.linear_proj.weight",
}
_OF_HEADS_AND_SHARED = ("xbc_proj.weight", "conv.weight", "conv.bias")  # of a Mamba-2 mixer
_MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")  # what names of weights begin with in a checkpoint
_ONLY = {  # fields of a TransformerConfig, and what they are in a decoder of lasp's
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "rotary_interleaved": False,
    "no_rope_freq": None,
    "softmax_scale": None,
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
}
_ONLY_EXPERTS = {
    "moe_shared_expert_intermediate_size": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}


def require_values(config: Any, wanted: dict[str, Any], where: str = "") -> None:
    """Raises ValueError unless the fields of a TransformerConfig, as far as its version has them, hold these values."""
    for field, value in wanted.items():
        got = getattr(config, field, value)
        require(got == value, field, got, f"{value}{where}")


def moe_layers(config: Any, num_layers: int) -> list[bool]:
    """Whether each layer's MLP is a mixture of experts, as `num_moe_experts` and `moe_layer_freq` say."""
    if config.num_moe_experts is None:
        return [False] * num_layers
    frequency = config.moe_layer_freq
    expected = f"a positive number, or {num_layers} numbers 0 or 1, one per layer"
    if isinstance(frequency, int):
        require(frequency > 0, "moe_layer_freq", frequency, expected)
        return [layer % frequency == 0 for layer in range(num_layers)]
    each = isinstance(frequency, list | tuple) and len(frequency) == num_layers and set(frequency) <= {0, 1}
    require(each, "moe_layer_freq", frequency, expected)
    return [bool(moe) for moe in frequency]


def shape_of(config: Any, *, pattern: str, mixer: str, vocab_size: int, rope_theta: float) -> ModelConfig:
    """The decoder that a GPTModel of this TransformerConfig is. Raises ValueError for one that lasp cannot express."""
    require_values(config, _ONLY)
    given: dict[str, Any] = {ours: getattr(config, theirs) for ours, theirs in _FIELDS.items()}
    given |= {"vocab_size": vocab_size, "pattern": pattern, "mixer": mixer, "rope_theta": rope_theta}
    shape = ModelConfig(**given, tie_embeddings=False)
    if config.num_moe_experts is None:
        return shape
    mixed = moe_layers(config, shape.num_layers)
    every = next((n for n, moe in enumerate(mixed, 1) if moe), 0)
    expected = "experts in the last of every so many layers"
    last_of_every = [every > 0 and (i + 1) % every == 0 for i in range(shape.num_layers)]
    require(last_of_every == mixed, "moe_layer_freq", config.moe_layer_freq, expected)
    require_values(config, _ONLY_EXPERTS)
    scores, chosen = config.moe_router_score_function, config.moe_router_topk
    return dataclasses.replace(
        shape,
        num_experts=config.num_moe_experts,
        experts_per_token=config.moe_router_topk,
        expert_intermediate_size=config.moe_ffn_hidden_size,
        moe_every=every,
        router_scores=scores,
        normalize_expert_weights=chosen > 1 if scores == "sigmoid" else not config.moe_router_pre_softmax,
        aux_loss_weight=config.moe_aux_loss_coeff,
        expert_bias_rate=config.moe_router_bias_update_rate if config.moe_router_enable_expert_bias else 0.0,
    )


def save(decoder: Decoder, output: str | Path) -> None:
    """Writes a decoder's weights, in their dtype, as a Megatron checkpoint to the new directory `output`."""
    folder = require_empty(output)
    ours, shape = decoder.state_dict(), decoder.config
    require(not shape.is_own, "model", shape.model_class or shape.mixer, "one of lasp's")
    for field in ("feature_map", "window", "negative_eigenvalues"):
        require(getattr(shape, field) is None, field, getattr(shape, field), "None: Megatron's layers have none")
    require(not shape.short_conv, "short_conv", True, "False: Megatron's layers have none besides their mixers'")
    require(shape.steps in (1, 2), "num_householder", shape.num_householder, "2, as Megatron's layers have it")
    require(shape.rope_theta is not None or SOFTMAX not in shape.layers, "rope_theta", None, "a number")
    require(shape.num_shared_experts == 0, "num_shared_experts", shape.num_shared_experts, "0")
    if shape.num_experts:
        normalized, several = shape.normalize_expert_weights, shape.experts_per_token > 1
        expected = f"{several} with {shape.experts_per_token} of them a token and {shape.router_scores} scores"
        fits = normalized == several or (several and shape.router_scores == "softmax")
        require(fits, "normalize_expert_weights", normalized, f"{expected}, as Megatron's routers have it")
    if decoder.head is None:
        ours["head.weight"] = ours["embedding.weight"]
    ours = _apart(ours, shape)
    theirs = {their: there(ours[our]).contiguous() for our, their, there, _ in _places(ours, shape)}
    storage.save(theirs, folder, alone=True)
    torch.save({}, folder / "common.pt")  # Megatron's place for what is no tensor
    (folder / "metadata.json").write_text(json.dumps(_NOTE))
    write_shape(folder, dataclasses.replace(shape, tie_embeddings=False))


def load(source: str | Path) -> Decoder:
    """The decoder of a Megatron checkpoint with a `lasp.json`, in float32.

    Raises ValueError if it is damaged, or has weights that this decoder has no place for.
    """
    folder = Path(source)
    shape = read_shape(folder)
    with torch.device("meta"):
        decoder = Decoder(shape)
    places = list(_places(_apart(decoder.state_dict(), shape), shape))
    saved = storage.read_metadata(folder).state_dict_metadata
    weights = {name for name in saved if name.startswith(_MODEL) and "_extra_state" not in name}
    unknown = sorted(weights - {their for _, their, _, _ in places})
    require(
        not unknown, f"checkpoint {folder}", unknown[:3], "only weights of the decoder that its lasp.json describes"
    )
    theirs = {}
    for _, their, _, _ in places:
        entry = saved.get(their)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"checkpoint {folder}: got no tensor {their}, expected a complete one of this model")
        theirs[their] = torch.empty(entry.size, dtype=entry.properties.dtype)
    storage.load(theirs, folder, alone=True)
    decoder.to_empty(device="cpu")
    decoder.init_weights()  # for buffers that no checkpoint has
    decoder.load_state_dict(_together({our: back(theirs[their]) for our, their, _, back in places}))
    return decoder


def write_shape(folder: Path, shape: ModelConfig) -> None:
    """Says what the weights in a checkpoint are those of."""
    (folder / SHAPE_FILE).write_text(json.dumps(dataclasses.asdict(shape), indent=2))


def read_shape(folder: Path) -> ModelConfig:
    """What `write_shape` wrote. Raises ValueError if it is not there."""
    require((folder / SHAPE_FILE).is_file(), "checkpoint", str(folder), f"a directory with a {SHAPE_FILE}")
    return ModelConfig(**json.loads((folder / SHAPE_FILE).read_text()))


def require_same_shape(folder: Path, expected: ModelConfig) -> None:
    """Raises ValueError unless a checkpoint's weights are those of such a model, however it is initialised."""
    saved, wanted = _architecture(read_shape(folder)), _architecture(expected)
    differences = ", ".join(
        f"{name} {saved[name]}, not {wanted[name]}" for name in wanted if saved[name] != wanted[name]
    )
    require(not differences, f"checkpoint {folder}", f"a model with {differences}", "this run's")


def _architecture(shape: ModelConfig) -> dict[str, object]:
    fields = ("vocab_size", "hidden_size", "num_heads", "intermediate_size", "mixer", "conv_width", "rope_theta")
    routing = ("num_experts", "experts_per_token", "moe_every", "router_scores", "normalize_expert_weights")
    experts = routing if shape.num_experts else ()
    derived = ("layers", "key_dim", "value_dim", "kv_heads", "norm_eps", "expert_size")
    return {"num_experts": 0} | {name: getattr(shape, name) for name in (*fields, *experts, *derived)}


def _apart(state: dict[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """Our weights, with two of each tensor that is two in Megatron's layers, by their names there."""
    if shape.plain_mixer != "mamba2":
        return state
    heads, apart = shape.num_heads * shape.value_dim, {}
    for name, x in state.items():
        if name.endswith(_OF_HEADS_AND_SHARED):
            module, _, tensor = name.rpartition(".")
            for part, rows in enumerate((x[:heads], x[heads:])):
                apart[f"{module}.parametrizations.{tensor}.original{part}"] = rows
        else:
            apart[name] = x
    return apart


def _together(apart: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_apart`."""
    state = {}
    for name, x in apart.items():
        if name.endswith(".original0"):
            name, x = name.replace(".parametrizations", ""), torch.cat([x, apart[f"{name[:-1]}1"]])
        if not name.endswith(".original1"):
            state[name.removesuffix(".original0")] = x
    return state


Change = Callable[[Tensor], Tensor]


def _places(ours: dict[str, Tensor], shape: ModelConfig) -> Iterator[tuple[str, str, Change, Change]]:
    """(our name, Megatron's name, our tensor to theirs, theirs to ours) of every weight."""
    for name in ours:
        if name in ("embedding.weight", "head.weight"):
            their = "embedding.word_embeddings.weight" if name == "embedding.weight" else "output_layer.weight"
            yield name, their, _pad_vocabulary, lambda x: x[: shape.vocab_size]
        elif name == "norm.weight":
            yield name, "decoder.final_layernorm.weight", _same, _same
        else:
            _, index, part = name.split(".", 2)
            softmax = shape.layers[int(index)] == SOFTMAX
            their = _PARTS.get(part) or (_SOFTMAX_PARTS[part] if softmax else _linear_part(part))
            there, back = _changes(part, softmax, shape)
            yield name, f"decoder.layers.{index}.{their}", there, back


def _linear_part(part: str) -> str:
    return "input_layernorm.weight" if part == "mixer_norm.weight" else f"self_attention.{part}"


def _changes(part: str, softmax: bool, shape: ModelConfig) -> tuple[Change, Change]:
    if part.startswith("mlp.experts."):
        return _transpose, _transpose
    if softmax and part == "mixer.qkv_proj.weight":
        queries, groups = shape.num_heads, shape.kv_heads
        each = queries // groups
        order = [
            head
            for group in range(groups)
            for head in (*range(group * each, (group + 1) * each), queries + group, queries + groups + group)
        ]
        return _reorder(order), _reorder(sorted(range(len(order)), key=order.__getitem__))
    return _same, _same


def _reorder(order: list[int]) -> Change:
    """Rows of heads, in another order of heads."""
    return lambda x: x.unflatten(0, (len(order), -1))[order].flatten(0, 1)


def _same(x: Tensor) -> Tensor:
    return x


def _transpose(x: Tensor) -> Tensor:
    return x.mT


def _pad_vocabulary(x: Tensor) -> Tensor:
    missing = -len(x) % VOCABULARY_MULTIPLE
    return torch.cat([x, x.new_zeros(missing, x.shape[1])])


def export_run(run_dir: str, output: str) -> str:
    """Writes the last checkpoint of a native run as a Megatron checkpoint; returns a line about it.

    Raises ValueError if `output` is neither new nor an empty directory, and for a checkpoint that cannot be written so.
    """
    with new_directory(output) as folder:
        path = checkpoint.require_latest(run_dir)
        config = checkpoint.read_config(path)
        require(config["dtype"] != "float64", "dtype", config["dtype"], "float32 or bfloat16")
        decoder = checkpoint.read_model(path, config, Decoder)
        save(decoder, folder)
    return f"{output}: {count_parameters(decoder.config):,} parameters of {path}"


def import_weights(source: str, output: str) -> str:
    """Writes the weights of a Megatron checkpoint to `output`, for TrainConfig.initial_weights.

    Returns the option of `lasp train` that takes them. Raises ValueError if `output` is neither new nor an empty
    directory.
    """
    with new_directory(output) as folder:
        decoder = load(source)
        checkpoint.save_weights(folder, decoder)
    return f"--initial-weights {output}"


def is_checkpoint(folder: str) -> bool:
    """Whether this is a directory of Megatron's distributed checkpoints."""
    return (Path(folder) / "metadata.json").is_file()
