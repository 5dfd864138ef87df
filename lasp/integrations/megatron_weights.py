"""Weights between lasp's decoders and checkpoints of Megatron-Core's GPTModel with lasp's layers.

Works on directories of `megatron.core.dist_checkpointing` (PyTorch's distributed checkpoints with a note beside them),
on one process and without Megatron-Core. What a Megatron run saved on any mesh can be read, and any mesh can load what
is written: by `Run.initial_weights`, or by `dist_checkpointing.load` without the entries `_extra_state`.

Linear mixers are the same modules on both sides. Elsewhere names differ, and:

    embedding, head    Megatron pads the vocabulary to a multiple of 128 (here with zeros: in its softmax they are
                       logits of 0), and has a head even if ours is the embedding
    softmax layers     Megatron's q, k, v rows go group by group: the queries of a key head, the key, the value
    experts            Megatron stores the transposed matrices
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
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


def shape_of(config: Any, *, pattern: str, mixer: str, vocab_size: int, rope_theta: float) -> ModelConfig:
    """The decoder that a GPTModel of this TransformerConfig is. Raises ValueError for one that lasp cannot express."""
    given: dict[str, Any] = {ours: getattr(config, theirs) for ours, theirs in _FIELDS.items()}
    given |= {"vocab_size": vocab_size, "pattern": pattern, "mixer": mixer, "rope_theta": rope_theta}
    shape = ModelConfig(**given, tie_embeddings=False)
    if config.num_moe_experts is None:
        return shape
    frequency = config.moe_layer_freq
    mixed = [not i % frequency for i in range(shape.num_layers)] if isinstance(frequency, int) else frequency
    every = next((n for n, moe in enumerate(mixed, 1) if moe), 0)
    expected = "experts in the last of every so many layers"
    last_of_every = [every > 0 and (i + 1) % every == 0 for i in range(shape.num_layers)]
    require(last_of_every == [bool(moe) for moe in mixed], "moe_layer_freq", frequency, expected)
    shared = config.moe_shared_expert_intermediate_size
    require(not shared, "moe_shared_expert_intermediate_size", shared, "None")
    return dataclasses.replace(
        shape,
        num_experts=config.num_moe_experts,
        experts_per_token=config.moe_router_topk,
        expert_intermediate_size=config.moe_ffn_hidden_size,
        moe_every=every,
        router_scores=config.moe_router_score_function,
        aux_loss_weight=config.moe_aux_loss_coeff,
        expert_bias_rate=config.moe_router_bias_update_rate if config.moe_router_enable_expert_bias else 0.0,
    )


def save(decoder: Decoder, output: str | Path) -> None:
    """Writes a decoder's weights, in their dtype, as a Megatron checkpoint to the new directory `output`."""
    folder = require_empty(output)
    ours, shape = decoder.state_dict(), decoder.config
    for field in ("feature_map", "window", "negative_eigenvalues"):
        require(getattr(shape, field) is None, field, getattr(shape, field), "None: Megatron's layers have none")
    require(not shape.short_conv, "short_conv", True, "False: Megatron's layers have none besides their mixers'")
    require(shape.steps in (1, 2), "num_householder", shape.num_householder, "2, as Megatron's layers have it")
    require(shape.rope_theta is not None or SOFTMAX not in shape.layers, "rope_theta", None, "a number")
    require(shape.num_shared_experts == 0, "num_shared_experts", shape.num_shared_experts, "0")
    if decoder.head is None:
        ours["head.weight"] = ours["embedding.weight"]
    theirs = {their: there(ours[our]).contiguous() for our, their, there, _ in _places(ours, shape)}
    storage.save(theirs, folder, alone=True)
    torch.save({}, folder / "common.pt")  # Megatron's place for what is no tensor
    (folder / "metadata.json").write_text(json.dumps(_NOTE))
    write_shape(folder, dataclasses.replace(shape, tie_embeddings=False))


def load(source: str | Path) -> Decoder:
    """The decoder of a Megatron checkpoint with a `lasp.json`, in float32. Raises ValueError if it is damaged."""
    folder = Path(source)
    with torch.device("meta"):
        decoder = Decoder(read_shape(folder))
    ours = decoder.state_dict()
    saved = storage.read_metadata(folder).state_dict_metadata
    theirs = {}
    for _, their, _, _ in _places(ours, decoder.config):
        entry = saved.get(their)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"checkpoint {folder}: got no tensor {their}, expected a complete one of this model")
        theirs[their] = torch.empty(entry.size, dtype=entry.properties.dtype)
    storage.load(theirs, folder, alone=True)
    decoder.to_empty(device="cpu")
    decoder.init_weights()  # for buffers that no checkpoint has
    decoder.load_state_dict({our: back(theirs[their]) for our, their, _, back in _places(ours, decoder.config)})
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
    experts = ("num_experts", "experts_per_token", "moe_every", "router_scores") if shape.num_experts else ()
    derived = ("layers", "key_dim", "value_dim", "kv_heads", "norm_eps", "expert_size")
    return {"num_experts": 0} | {name: getattr(shape, name) for name in (*fields, *experts, *derived)}


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
