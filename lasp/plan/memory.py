"""How much memory a training step takes on each GPU: its parts at the moments of the step that may need most.

P parameters, W GPUs, n tokens of a rank that are in flight (of its part of a context, or of a segment of a stream).
AdamW holds two moments in float32 beside float32 weights. With FSDP all of it is divided by W, and there are besides,
whole and in the dtype of the compute: both ends of the model, the layer in work and the next one, and the gradients of
the ends and of one layer, which are summed in float32.

The peak is at one of these moments, each with weights and optimiser states:

    loss        all that is kept until backward; a chunk of logits with its gradient; the gradient of the head
    backward    for each layer what it and those before it keep, and what its backward takes; gathered gradients, and
                gradients of the layers behind it
    update      all gradients

All gradients are there from the first moment on where a step sees several contexts or segments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lasp.config import DELTA, LEVELS, LINEAR, SOFTMAX, ModelConfig
from lasp.models.features import feature_dim
from lasp.models.loss import CHUNK_TOKENS
from lasp.models.products import TILE
from lasp.models.recompute import Policy, by_layer
from lasp.plan import kept
from lasp.plan.kept import CHUNK, Dtype, Kept
from lasp.plan.setting import Job, Setting, sizes

LEAF, NODES = 256, 18  # of log-linear attention: tokens of a leaf, and bytes of a number of its states and gradients
DELTA_NODES = 0.625  # with the delta rule: bytes of states, transitions and rows for each token, head and K (K + V)
DELTA_KEPT = 0.2  # of them, where those of few tokens wait for other ranks
WHOLE_SHARE = 0.1  # of a GPU's memory may whole parameters and sums of gradients take from segment to segment
TILES = 64  # into which operations with a state cut a long sequence, about; a state enters each, and one leaves
GROWS = ("layer inputs", "other activations", "one layer", "key/value caches", "boundary states", "batch")


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU, by moment and part; of the host for each GPU."""

    moments: dict[str, dict[str, float]]
    host: float

    @property
    def moment(self) -> str:
        """That which needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        return self.moments[self.moment]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def grown(self) -> str:
        """The largest part at the peak of those that grow with the context."""
        return max((part for part in GROWS if part in self.parts), key=self.parts.__getitem__)


def predict(job: Job, setting: Setting) -> Memory:
    """What a step of the job takes with these settings."""
    model, dtype = job.model, Dtype(job.half)
    held, in_flight = _tokens(job, setting)
    fixed, gradients, gathered, of_gathered = _parameters(job, setting, dtype)
    policies = by_layer(setting.recompute, setting.recompute_layers, model.layers)
    one_input, host = dtype.half * model.hidden_size * in_flight, 0.0
    graphs = min(setting.segment_graphs, segments(job, setting))
    if setting.offload_activations:
        host = inputs_on_host(one_input, policies, graphs)
    everything = [dtype.bytes(kept.POLICIES[policy](model, i)) * in_flight for i, policy in enumerate(policies)]
    inputs = [one_input * (policy == "none" or not setting.offload_activations) for policy in policies]
    of_ends = dtype.bytes([*kept.ends(model), Kept("normed hidden", model.hidden_size)]) * in_flight

    def activations(layers: int, waiting: int) -> dict[str, float]:
        """Of the first so many, and of all in the segments whose graphs are waiting, with what the head takes there."""
        on_their_way = min(2, layers) * one_input * setting.offload_activations  # one of them is used
        elsewhere = sum(everything) - one_input * model.num_layers + 2 * one_input
        return {
            "layer inputs": sum(inputs[:layers]) + waiting * sum(inputs) + on_their_way,
            "other activations": sum(everything[:layers]) - one_input * layers + waiting * elsewhere,
        }

    shared = job.context, setting.sequence_parallel, setting.segment_tokens, job.half
    left = handed_on(model, *shared)
    if setting.segment_offload:  # but for what one segment reads
        host += sum(handed_on(model, *shared, pinned).values())
        left = {name: 2 * size * in_flight / held for name, size in left.items()}
    always = fixed | {"batch": 4 * 8.0 * in_flight} | left
    copies = 2 if job.sharding == "none" and job.gpus > 1 else 0  # while they are summed over ranks

    def moments(waiting: int, again: bool) -> dict[str, dict[str, float]]:
        """again: gradients of a context or segment before are there."""
        found = {
            "loss": activations(model.num_layers, waiting)
            | {"gradients": gradients * again, "gathered weights": gathered, "logits and loss": _logits(job) + of_ends},
            "update": {"gradients": (1 + copies) * gradients},
        }
        for index, policy in enumerate(policies):
            behind = 1.0 if again else 1 - (index + 1) / model.num_layers
            found[f"backward of layer {index + 1}"] = activations(index + 1, waiting) | {
                "gradients": gradients * behind,
                "gathered weights": gathered,
                "gathered gradients": of_gathered,
                "one layer": _one_layer(job, policy, index, in_flight, setting.sequence_parallel > 1),
            }
        return {name: always | parts for name, parts in found.items()}

    made = Memory(moments(graphs - 1, job.accumulated > job.at_once), host)  # of a stream at its last segment
    if not left:
        return made
    return max(made, Memory(moments(max(0, graphs - 2), True), host), key=lambda memory: memory.total)


def inputs_on_host(one: float, policies: list[Policy], graphs: int) -> float:
    """Bytes of the host for inputs of layers that are computed again, of so many bytes each."""
    return graphs * sum(policy != "none" for policy in policies) * pinned(one)


def pinned(size: float) -> float:
    """Bytes of the host that a tensor of so many takes: PyTorch's pinned memory comes in powers of two."""
    return 2.0 ** math.ceil(math.log2(max(1.0, size)))


def may_stay_gathered(others: int, memory: float | None) -> bool:
    """Whether FSDP's ranks keep a stream's parameters and sums of gradients whole from its first segment to its last.

    others: parameters that a rank does not hold. They take 6 bytes each, in half precision and as a sum of gradients,
    of so many bytes of its memory (None: nobody knows, as on a CPU).
    """
    return memory is None or 6 * others <= WHOLE_SHARE * memory


def segments(job: Job, setting: Setting) -> int:
    """Of a context."""
    return 1 if setting.segment_tokens is None else -(-job.context // setting.segment_tokens)


def _tokens(job: Job, setting: Setting) -> tuple[int, int]:
    """Of a rank's part of the contexts that it has at once, and of what of it is in flight."""
    held, segment = job.model.local_tokens(job.context, setting.sequence_parallel), setting.segment_tokens
    if segment is None:
        held *= min(job.at_once, job.accumulated)
        return held, held
    return held, min(held, job.model.local_tokens(segment, setting.sequence_parallel))


def _parameters(job: Job, setting: Setting, dtype: Dtype) -> tuple[dict[str, float], float, float, float]:
    """Weights and optimiser states; gradients; what of weights and of gradients is gathered."""
    size, half, exact = sizes(job.model), dtype.half, dtype.wide
    mixtures = sum(job.model.has_experts(i) for i in range(job.model.num_layers))
    experts = size.experts / max(1, mixtures) / job.expert_parallel  # of one layer, on one rank
    layer = max(size.layers) + experts
    whole, share = size.total - size.experts + experts * mixtures, size.total / job.gpus
    gathered, of_gathered = half * (size.ends + 2 * layer), half * (size.ends + layer)
    if job.sharding == "fsdp":
        if segments(job, setting) > 1 and may_stay_gathered(int(whole - share), job.gpu.memory):
            return _fixed(exact * share, exact * share), exact * whole, half * whole, of_gathered
        sums = exact * layer if exact != half else 0.0
        return _fixed(exact * share, exact * share), exact * share, gathered, of_gathered + sums
    if job.sharding in ("none", "zero-0"):
        return _fixed(exact * whole, exact * whole), exact * whole, 0.0, 0.0
    stage = int(job.sharding[-1])
    weights = half * (share if stage == 3 else whole) + exact * share
    gradients = half * (whole if stage == 1 else share)
    return _fixed(weights, exact * share), gradients, *((gathered, of_gathered) if stage == 3 else (0.0, 0.0))


def _fixed(weights: float, moment: float) -> dict[str, float]:
    return {"weights": weights, "optimiser states": 2 * moment}


def _logits(job: Job) -> float:
    """Of a chunk of tokens logits, then their gradient; the head's gradient in float32, and at last as its weights."""
    model, dtype = job.model, Dtype(job.half)
    head = model.vocab_size * model.hidden_size
    return dtype.half * CHUNK_TOKENS * model.vocab_size + (dtype.wide + dtype.half) * head


def handed_on(
    model: ModelConfig,
    context: int,
    ranks: int,
    segment_tokens: int | None,
    half: int,
    taken: Callable[[float], float] = float,
) -> dict[str, float]:
    """Bytes that segments leave to each other on each rank, at most: states; and of softmax attention keys and values,
    their gradients, and what queries saw. States and sums are float32. Tails of convolutions, a few percent of the
    states, do not count.

    half: bytes of the compute's numbers. taken: bytes that a tensor of so many takes.
    """
    if segment_tokens is None:
        return {}
    wide, cuts = Dtype(half).wide, -(-context // segment_tokens) - 1
    held, rows = (model.local_tokens(tokens, ranks) for tokens in (context, min(context, segment_tokens)))
    state = model.states(context) * model.num_heads * feature_dim(model) * model.value_dim
    keys, heads = model.kv_heads * model.key_dim * rows, model.num_heads * rows
    of_segment = (
        2 * (taken(keys * half) + taken(keys * wide)) + taken(heads * model.key_dim * half) + taken(heads * wide)
    )
    return {
        "boundary states": model.layers.count(LINEAR) * cuts * taken(state * wide),
        "key/value caches": model.attending * held / rows * of_segment,
    }


def _one_layer(job: Job, policy: Policy, index: int, tokens: int, exchanged: bool) -> float:
    """Bytes that a layer's backward takes beside what was kept for it: what it computes again, and gradients.

    Its MLP comes first, when all of the mixer has been computed again; then the mixer's operation, when what lies
    behind it has been freed. exchanged: that waits for other ranks.
    """
    model, dtype = job.model, Dtype(job.half)
    width = dtype.half * model.hidden_size
    stays = {each.name for each in kept.POLICIES[policy](model, index)}
    mixer = [*kept.mixer(model, index), Kept("normed", model.hidden_size)]
    behind = {"gate", "gated", "normed o", "silu of the gate", "o + D x"}

    def again(parts: list[Kept]) -> float:
        return dtype.bytes(each for each in parts if each.name not in stays)

    mlp_inputs = [Kept("middle", model.hidden_size), Kept("normed middle", model.hidden_size)]
    in_mlp = again(mixer) + again(mlp_inputs) + 2 * width + _mlp(job, policy, index)  # gradients of both ends
    in_operation = again([each for each in mixer if each.name not in behind]) + width  # what goes around it
    in_operation += _operation_gradients(model, index, dtype, tokens, exchanged)
    return max(in_mlp, in_operation) * tokens + _constants(job, policy, index, tokens)


def _mlp(job: Job, policy: Policy, index: int) -> float:
    """Bytes for each token."""
    model, half = job.model, job.half
    if model.has_experts(index):
        size, width = model.expert_size, model.hidden_size
        computed = 0.0 if policy == "none" else Dtype(half).bytes(kept.mlp(model, index))
        most = max(width, size, 2 * size - width)  # gradients of outputs, act, gate_up, less what is free by then
        return computed + half * model.experts_per_token * most
    return half * 3 * model.intermediate_size if policy == "none" else 0.0


def _constants(job: Job, policy: Policy, index: int, tokens: int) -> float:
    """Bytes that do not grow with the context: a tile of an MLP with its gradients, their sums; the states of tiles."""
    model, dtype = job.model, Dtype(job.half)
    states = 0.0
    if model.layers[index] == LINEAR:
        states = 2.0 * TILES * dtype.wide * model.num_heads * model.key_dim * model.value_dim
    if model.has_experts(index) or policy == "none":
        return states
    tile = 3 * dtype.half * min(TILE, 2 * model.intermediate_size * tokens)
    return states + tile + (dtype.wide + dtype.half) * 3 * model.intermediate_size * model.hidden_size


def _operation_gradients(model: ModelConfig, index: int, dtype: Dtype, tokens: int, exchanged: bool) -> float:
    """Bytes for each token: the gradient of o, those of q, k and v, and what the kernels of the class need besides."""
    heads, keys, values = model.num_heads, feature_dim(model), model.value_dim
    if model.layers[index] == SOFTMAX:
        return dtype.half * (2 * heads + 2 * model.kv_heads) * model.key_dim
    gradients = dtype.half * 2 * heads * (keys + values)
    if model.mixer in ("linear", "lightning", "retention", "gla", "hgrn2"):  # kernels copy what are views of a product
        gradients += dtype.half * heads * (values + (2 * keys if model.mixer == "gla" else 0))
    state = dtype.half * keys * values / CHUNK  # of every chunk, for each token and head
    if model.mixer in ("gla", "hgrn2"):
        return gradients + 2 * heads * state + dtype.wide * heads * keys
    if model.aligned:
        gradients += heads * 2 * dtype.wide * LEVELS
        if model.plain_mixer == "gated_delta_net":
            some = min(heads, max(1, 2**18 // max(1, tokens)))
            others = (heads - some) * (exchanged and heads * tokens <= 2**21)
            nodes = keys * (keys + values)
            rows = dtype.half * (4 * keys + 2 * values + 4 * CHUNK) + 2 * dtype.wide * LEVELS
            return gradients + some * DELTA_NODES * nodes + others * (DELTA_KEPT * nodes + rows)
        return gradients + heads * (NODES * keys * values / LEAF + dtype.wide * keys)
    if model.mixer in DELTA:
        steps = model.steps
        some = min(heads, max(4, 2**19 // (2 * max(1, steps * tokens))))
        rescaled = (3 * dtype.half + dtype.wide) * heads * keys if model.mixer == "kda" else 0
        if model.mixer == "gated_delta_product":  # q and the gradients of q and o are as long as k's
            gradients = dtype.half * heads * (steps * (3 * keys + 2 * values) + keys + values)
        return gradients + 2 * some * steps * (state + dtype.half * values) + rescaled
    return gradients + (dtype.wide * heads * keys if model.mixer == "mamba2" else 0)  # one key for all heads: a sum
