"""What layers keep until backward, number by number for each token of a rank: the formulas behind `lasp plan`.

A line is a storage that lasp.models or an operation of lasp.kernels saves; views cost nothing. `layer` is all that a
layer saves, `selective` and `full` what of it the policies of lasp.models.recompute leave.

Numbers are in the dtype of the compute, or `wide` (float32 at least). Pieces marked `fused` in the code keep their
inputs alone where a GPU runs them as one kernel; what they and PyTorch keep besides on a CPU is `eager`. What only the
kernels of GPUs keep is `device`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lasp.config import DELTA, LEVELS, LINEAR, SOFTMAX, ModelConfig
from lasp.models.features import feature_dim
from lasp.models.mixers import DELTA_KINDS

CHUNK = 64  # of the delta rule's kernels: T and P have so many columns
Where = Literal["everywhere", "eager", "device"]
Gate = Literal["silu", "sigmoid"]


@dataclass(frozen=True)
class Kept:
    """One storage. numbers: for each token. size: "half" stands for the dtype of the compute."""

    name: str
    numbers: float
    size: Literal["half", "wide", "index"] = "half"
    where: Where = "everywhere"


@dataclass(frozen=True)
class Dtype:
    """Bytes of the numbers, and whether pieces run as one kernel on a device."""

    half: int = 2
    device: bool = True

    @property
    def wide(self) -> int:
        return max(4, self.half)

    def bytes(self, kept: Iterable[Kept]) -> float:
        """For each token."""
        sizes = {"half": self.half, "wide": self.wide, "index": 8}
        absent: Where = "eager" if self.device else "device"
        return sum(each.numbers * sizes[each.size] for each in kept if each.where != absent)


def layer(config: ModelConfig, index: int) -> list[Kept]:
    """All that the layer keeps, with the policy "none"."""
    width = config.hidden_size
    return [
        Kept("input", width),
        *_norm("mixer", width),
        Kept("normed", width),
        *mixer(config, index),
        Kept("middle", width),
        *_norm("mlp", width),
        Kept("normed middle", width),
        *mlp(config, index),
    ]


def selective(config: ModelConfig, index: int) -> list[Kept]:
    """What stays of it with "selective": the input, products, and what operations gave."""
    heads, keys, values, width = config.num_heads, config.key_dim, config.value_dim, config.hidden_size
    kept = [Kept("input", width), Kept("out", width), *_operation(config, index)]
    if config.layers[index] == SOFTMAX:
        kept += [Kept("qkv", (heads + 2 * config.kv_heads) * keys)]
    elif config.plain_mixer == "mamba2":
        kept += [Kept("xbc", heads * values + 2 * keys), Kept("dt product", heads), Kept("o", heads * values)]
        kept += [Kept("gate", heads * values)]
    else:
        steps = config.steps
        kept += [Kept("qkv", heads * (keys + steps * (keys + values))), Kept("o", heads * values)]
        kept += [Kept("gate", heads * values)] if config.mixer not in ("linear", "hgrn2") else []
        kept += {
            "delta_net": [Kept("beta product", heads)],
            "gated_delta_net": [Kept("beta product", heads), Kept("dt product", heads)],
            "gated_delta_product": [Kept("beta product", steps * heads), Kept("dt product", heads)],
            "kda": [Kept("beta product", heads), Kept("low rank", keys), Kept("dt product", heads * keys)],
            "gla": [Kept("low rank", 16), Kept("decay product", heads * feature_dim(config))],
        }.get(config.plain_mixer, [])
    if config.aligned and config.layers[index] == LINEAR:
        kept += [Kept("product of scales", heads * LEVELS)]
    if config.window is not None and config.layers[index] == LINEAR:
        products = [Kept("qkv", (heads + 2 * config.kv_heads) * keys), Kept("gate product", heads), Kept("out", width)]
        kept += _in_window([*products, *_attention(config)])
    if not config.has_experts(index):
        return [*kept, Kept("gate_up", 2 * config.intermediate_size)]
    shared = config.num_shared_experts * config.expert_size
    return [*kept, Kept("gate_up", 2 * shared)]


def full(config: ModelConfig, index: int) -> list[Kept]:
    return [Kept("input", config.hidden_size)]


def ends(config: ModelConfig) -> list[Kept]:
    """The embedding's ids; the last norm, and the gradient that the loss leaves for it."""
    width = config.hidden_size
    return [
        Kept("ids", 1, "index"),
        Kept("last hidden", width),
        *_norm("last", width),
        Kept("gradient of hidden", width),
    ]


def mixer(config: ModelConfig, index: int) -> list[Kept]:
    if config.layers[index] == SOFTMAX:
        return _softmax(config) + _attention(config)
    kept = _MIXERS[config.plain_mixer](config) + _operation(config, index)
    if config.aligned:
        kept += _level_scales(config)
    if config.window is not None:
        gated = [Kept("gate", 2 * config.num_heads), Kept("gated", config.num_heads * config.key_dim)]
        kept += _in_window([*_softmax(config), *_attention(config), *gated])
    return kept


def _in_window(kept: list[Kept]) -> list[Kept]:
    return [replace(each, name=f"{each.name} of the window") for each in kept]


def mlp(config: ModelConfig, index: int) -> list[Kept]:
    if not config.has_experts(index):
        return _gated_mlp(config.intermediate_size)
    width, size, chosen = config.hidden_size, config.expert_size, config.experts_per_token
    routed = [
        Kept("input of the router", width, "wide", "device"),
        Kept("scores", 3 * config.num_experts, "wide"),
        Kept("chosen", chosen, "index"),
        Kept("orders", 2 * chosen, "index"),
        Kept("sums of scores", 3 + 2 * chosen, "wide"),
        Kept("tokens of experts", chosen * width),
        Kept("gate_up of experts", 2 * chosen * size),
        Kept("act of experts", chosen * size),
        Kept("outputs of experts", chosen * width),
    ]
    shared = config.num_shared_experts * size
    return routed + (_gated_mlp(shared) if shared else [])


def _gated_mlp(size: int) -> list[Kept]:
    return [Kept("gate_up", 2 * size), Kept("act", size)]


def _norm(name: str, numbers: float, rows: float = 1) -> list[Kept]:
    return [Kept(f"{name} rstd", rows, "wide"), Kept(f"{name} scaled", numbers, where="eager")]


def _operation(config: ModelConfig, index: int) -> list[Kept]:
    """What operations over the sequence keep besides their inputs."""
    heads = config.num_heads
    if config.layers[index] == SOFTMAX:
        return _attention(config)
    if config.aligned:
        return []
    if config.mixer in DELTA:
        rows = config.steps * heads
        gates = Kept("gates of chunks", 4 * rows, "wide", "device")
        return [Kept("T and P of chunks", 2 * CHUNK * rows, where="device"), gates]
    return [Kept("gates of chunks", 2 * heads, "wide", "device")] if config.mixer == "mamba2" else []


def _attention(config: ModelConfig) -> list[Kept]:
    return [Kept("o", config.num_heads * config.key_dim), Kept("lse", config.num_heads, "wide")]


def _output(config: ModelConfig, gate: Gate | None) -> list[Kept]:
    """GatedOutput."""
    heads, values = config.num_heads, config.num_heads * config.value_dim
    kept = [Kept("o", values), *_norm("o", values, rows=heads)]
    if gate is None:
        return [*kept, Kept("normed o", values)]
    kept += [Kept("normed o", values, where="eager"), Kept("gate", values), Kept("gated", values)]
    return [*kept, Kept("silu of the gate", values, where="eager")] if gate == "silu" else kept


def _delta(config: ModelConfig) -> list[Kept]:
    heads, keys, values = config.num_heads, config.num_heads * config.key_dim, config.num_heads * config.value_dim
    steps, kind = config.steps, DELTA_KINDS[config.plain_mixer]
    channels = keys + steps * (keys + values)
    decays = {"delta_net": 0, "kda": keys}.get(config.plain_mixer, heads)
    negative = kind.negative if config.negative_eigenvalues is None else config.negative_eigenvalues
    return [
        *_short_conv("qkv", channels),
        Kept("activated", channels, where="eager"),
        Kept("norms of q and k", (1 + steps) * heads, "wide", "eager"),
        Kept("q", keys),
        Kept("k", steps * keys),
        Kept("v", steps * values),
        Kept("beta", steps * heads, "wide"),
        Kept("half of beta", steps * heads * negative, "wide"),
        Kept("low rank", config.key_dim if config.mixer == "kda" else 0),
        Kept("dt product", decays, where="device"),
        Kept("dt before softplus", decays, "wide", "eager"),
        Kept("dt", decays, "wide", "eager"),
        Kept("decay", decays, "wide"),
        *_output(config, "sigmoid" if config.mixer == "kda" else "silu"),
    ]


def _short_conv(product: str, channels: int) -> list[Kept]:
    """A GPU's kernel keeps the product that it reads; on a CPU that is copied behind its tail, and SiLU keeps sums."""
    copies = [Kept("rows", channels, where="eager"), Kept("convolved", channels, where="eager")]
    return [Kept(product, channels, where="device"), *copies]


def _linear(config: ModelConfig) -> list[Kept]:
    """v, and q and k before what is done to them, are views of their product, or what a convolution makes of it."""
    keys, values = config.num_heads * config.key_dim, config.num_heads * config.value_dim
    features = [Kept("q", keys), Kept("k", keys)] if config.feature_map != "identity" else []
    if config.feature_map == "hedgehog":
        features = [Kept("q", 2 * keys), Kept("k", 2 * keys), Kept("softmax", 4 * keys)]
    own = features if config.feature_map is not None else []
    rotates = config.mixer == "retention"
    under_features = 2 * keys if config.feature_map != "relu" else 0  # whose gradient asks for its result
    gates: dict[str, Gate] = {"lightning": "sigmoid", "retention": "silu", "gla": "silu"}
    before = {
        "linear": features,
        "lightning": features,
        "retention": [*own, Kept("rotated", under_features), Kept("angles", 2 * config.key_dim, "wide")],
        "gla": [*own, *_gla_decay(config.num_heads * feature_dim(config))],
        "hgrn2": [*features, *_forget_gate(keys)],
    }[config.mixer]
    product = [Kept("qkv", 2 * keys + values)]
    if config.short_conv:
        parts = Kept("parts", values if rotates else under_features + values)
        product = [*_short_conv("qkv", 2 * keys + values), parts]
    return [*product, *before, *_output(config, gates.get(config.mixer))]


def _gla_decay(keys: int) -> list[Kept]:
    buffer = Kept("buffer", keys, "wide", "eager")
    return [Kept("low rank", 16), Kept("decay product", keys), buffer, Kept("decay", keys, "wide")]


def _forget_gate(keys: int) -> list[Kept]:
    return [Kept("buffer", keys, "wide", "eager"), Kept("decay", keys, "wide"), Kept("expm1", keys, "wide", "eager")]


def _mamba2(config: ModelConfig) -> list[Kept]:
    heads, values = config.num_heads, config.num_heads * config.value_dim
    channels = values + 2 * config.key_dim
    return [
        *_short_conv("xbc", channels),
        Kept("activated", channels),
        Kept("dt product", heads, where="device"),
        Kept("dt before softplus", heads, "wide", "eager"),
        Kept("dt", heads, "wide"),
        Kept("decay", heads, "wide"),
        Kept("v", values),
        Kept("o + D x", values),
        Kept("gate", values),
        Kept("silu of the gate", values),
        Kept("gated", values),
        *_norm("o", values),
        Kept("normed o", values),
    ]


def _level_scales(config: ModelConfig) -> list[Kept]:
    numbers = config.num_heads * LEVELS
    sums = Kept("sums of scales", numbers, "wide", "eager")
    return [Kept("product of scales", numbers, where="device"), sums, Kept("scales", numbers, "wide")]


def _softmax(config: ModelConfig) -> list[Kept]:
    heads, groups, size = config.num_heads, config.kv_heads, config.key_dim
    rotated = [Kept("angles", 2 * size, "wide"), Kept("q", heads * size), Kept("k", groups * size)]
    return [Kept("qkv", (heads + 2 * groups) * size), *(rotated if config.rope_theta is not None else [])]


_MIXERS: dict[str, Callable[[ModelConfig], list[Kept]]] = {
    **dict.fromkeys(("linear", "lightning", "retention", "gla", "hgrn2"), _linear),
    **dict.fromkeys(DELTA, _delta),
    "mamba2": _mamba2,
}
POLICIES: dict[str, Callable[[ModelConfig, int], list[Kept]]] = {"none": layer, "selective": selective, "full": full}
