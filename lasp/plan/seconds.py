"""How long a training step takes, from what it computes and moves.

    products     2 FLOP a parameter and token, three passes (forward, both gradients); recomputation adds one, but for
                 the last product of an MLP
    softmax      4 FLOP a pair of tokens and channel, of which causal attention has T/2 a token; backward 2.5 times that
    operations   those with a state: time a token, from measurement, in proportion to the memory's speed
    chains       of pointwise operations, norms and convolutions: each reads and writes what the layer keeps a few times
    update       28 bytes a parameter that this rank holds, and as many for gathering and summing it

The constants are from steps on H200s that docs/streaming.md tells of: of one of 65,536 tokens of Linear-Llama3-1B, with
everything computed again, products take 950 of 1,258 ms, and chains 240. Other models, lengths and GPUs follow.
"""

from lasp.config import LINEAR, SOFTMAX
from lasp.models.features import feature_dim
from lasp.models.recompute import by_layer
from lasp.plan import kept
from lasp.plan.gpus import MATMUL
from lasp.plan.kept import Dtype
from lasp.plan.memory import segments
from lasp.plan.setting import Job, Setting, sizes

GROUPED = 0.5  # of the dense peak, where each expert's matrix meets its own rows
ATTENTION = 0.55  # of it: cuDNN's kernels on an H200, which serve whole units and segments of one document
FLASH = 0.33  # of it: PyTorch's flash attention there, which serves windows and heads of more than 128
FORWARD_CHAINS, BACKWARD_CHAINS = 1.9, 5.5  # times what a layer keeps is read or written
EXCHANGED = 1.02  # with sequence parallelism

# Nanoseconds of forward and backward for a token of 16 heads of 128, where copies move 4.3 TB/s; forward is 0.3 of it.
REFERENCE_BANDWIDTH = 4.3e12
FORWARD = 0.3
OPERATIONS = {
    "linear": 18.1,
    "lightning": 19.9,
    "retention": 19.9,
    "mamba2": 22.7,
    "gla": 71.0,
    "hgrn2": 71.0,
    "delta_net": 35.0,
    "gated_delta_net": 35.5,
    "gated_delta_product": 35.5,  # each step: gated_delta_net's
    "kda": 138.0,
    "log_linear_mamba2": 132.0,
    "log_linear_gated_delta_net": 752.0,
}


def predict(job: Job, setting: Setting) -> dict[str, float]:
    """Seconds of a step, by what takes them. A data-parallel group sees `accumulated` contexts in it."""
    model, gpu = job.model, job.gpu
    tokens = job.accumulated * model.local_tokens(job.context, setting.sequence_parallel)
    policies = by_layer(setting.recompute, setting.recompute_layers, model.layers)
    full = [policy == "full" for policy in policies]
    again = 1 - policies.count("none") / model.num_layers  # of the layers: something of them runs twice
    number = segments(job, setting)
    forwards = 2 - min(setting.segment_graphs, number) / number  # softmax layers keep what queries saw in the first

    flops = gpu.flops * (1 if job.half == 2 else 0.25)
    size, share = sizes(model), model.experts_per_token / model.num_experts if model.num_experts else 0.0
    dense: float = (2 + forwards) * sum(size.layers) + 3 * model.vocab_size * model.hidden_size
    dense += sum(size.layers[index] - _last_product(job, index) for index in range(model.num_layers) if full[index])
    experts = (2 + forwards + again) * size.experts * share
    chains = sum(Dtype(job.half).bytes(kept.layer(model, index)) for index in range(model.num_layers))
    softmax = _passes(model.layers, SOFTMAX, [each and number == 1 for each in full], 1)
    linear = _passes(model.layers, LINEAR, full, forwards)
    attention = 2.0 * job.context * model.num_heads * model.key_dim * (softmax[0] + 2.5 * softmax[1])
    attention /= ATTENTION if model.key_dim <= 128 else FLASH
    operations = (FORWARD * linear[0] + (1 - FORWARD) * linear[1]) * OPERATIONS[model.mixer] * model.steps * 1e-9
    if model.window is not None:
        seen = 4.0 * model.window * model.num_heads * model.key_dim
        attention += seen * (linear[0] + 2.5 * linear[1]) / FLASH
    operations *= model.num_heads * (feature_dim(model) + model.value_dim) * job.half / (16 * 256 * 2)
    held = sizes(model).total / (job.gpus if job.sharding != "none" else 1)
    seconds = {
        "products": tokens * 2 * (dense / MATMUL + experts / GROUPED) / flops,
        "softmax attention": tokens * attention / flops,
        "operations with a state": tokens * operations * REFERENCE_BANDWIDTH / gpu.bandwidth,
        "pointwise chains": tokens * chains * (FORWARD_CHAINS * (forwards + again) + BACKWARD_CHAINS) / gpu.bandwidth,
        "update and sharding": (28 + 28 * (job.sharding != "none")) * held / gpu.bandwidth,
    }
    exchanged = EXCHANGED if setting.sequence_parallel > 1 else 1.0
    seconds = {name: part * exchanged for name, part in seconds.items() if part}
    if setting.offload_activations:
        moved = 2 * tokens * again * model.num_layers * job.half * model.hidden_size / gpu.link
        seconds["waiting for the host"] = max(0.0, moved - sum(seconds.values()))
    return seconds


def _passes(letters: str, kind: str, full: list[bool], forwards: float) -> tuple[float, int]:
    """Forward and backward passes through the layers of a kind, those that run again included."""
    layers = [again for letter, again in zip(letters, full, strict=True) if letter == kind]
    return forwards * len(layers) + sum(layers), len(layers)


def _last_product(job: Job, index: int) -> int:
    """Parameters of an MLP's last product, which nothing asks for again."""
    return 0 if job.model.has_experts(index) else job.model.hidden_size * job.model.intermediate_size
