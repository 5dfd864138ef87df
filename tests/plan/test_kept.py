"""The plan's formulas beside what is really saved."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lasp.config import LEVELS, MIXERS, ModelConfig
from lasp.kernels.log_linear import log_linear_delta_inputs
from lasp.kernels.pending import Pending
from lasp.kernels.segments import Segments
from lasp.model_config import OPTIONAL_CONV
from lasp.models import Decoder, linear_llama3_1b
from lasp.plan.kept import POLICIES, Dtype, ends, layer
from lasp.plan.memory import _operation_gradients
from tests.models.helpers import random_tokens, sequence
from tests.models.saved import counting

TOKENS = 128
DENSE = ModelConfig(
    vocab_size=8,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    value_head_dim=24,
    num_kv_heads=2,
    intermediate_size=160,
    pattern="L",
)
MIXTURE = replace(DENSE, num_experts=8, experts_per_token=3, expert_intermediate_size=24, num_shared_experts=2)
MODELS = {mixer: replace(DENSE, mixer=mixer) for mixer in MIXERS}
MODELS |= {
    "hedgehog": replace(DENSE, mixer="gla", feature_map="hedgehog"),
    "rotated hedgehog": replace(DENSE, mixer="retention", feature_map="hedgehog"),
    "rotated relu": replace(DENSE, mixer="retention", feature_map="relu"),
    "rotated elu behind a convolution": replace(
        DENSE, mixer="retention", feature_map="elu", short_conv=True, head_dim=48
    ),
    "relu behind a convolution": replace(DENSE, mixer="lightning", feature_map="relu", short_conv=True),
    "identity": replace(DENSE, mixer="linear", feature_map="identity"),
    **{f"{mixer} behind a convolution": replace(DENSE, mixer=mixer, short_conv=True) for mixer in OPTIONAL_CONV},
    "window": replace(DENSE, window=8),
    "window beside mamba2": replace(DENSE, mixer="mamba2", window=8),
    "window beside levels": replace(DENSE, mixer="log_linear_mamba2", window=8),
    "three steps": replace(DENSE, mixer="gated_delta_product", num_householder=3, negative_eigenvalues=False),
    "negative eigenvalues": replace(DENSE, negative_eigenvalues=True),
    "no positions": replace(DENSE, pattern="N", rope_theta=None),
}
MODELS |= {"softmax": replace(DENSE, pattern="N"), "hybrid of mixtures": replace(MIXTURE, pattern="LN")}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_predicted_bytes_are_those_that_are_saved(name, policy):
    config = MODELS[name]
    model, tokens = Decoder(config), random_tokens(1, TOKENS) % config.vocab_size
    model.recompute = policy
    with counting(model) as saved:
        model(tokens, sequence(TOKENS), labels=tokens)
    each = [kept for index in range(config.num_layers) for kept in POLICIES[policy](config, index)]
    predicted = Dtype(half=4, device=False).bytes([*each, *ends(config)]) * TOKENS
    assert predicted == pytest.approx(saved.bytes, rel=0.05)


def test_bytes_follow_dtype_and_device():
    kept = layer(linear_llama3_1b(pattern="L"), 0)
    assert Dtype(2).bytes(kept) < Dtype(4).bytes(kept) < 2 * Dtype(2).bytes(kept)
    assert Dtype(2).bytes(kept) < Dtype(2, device=False).bytes(kept)
    # On an H200 a step grew by 224 KiB a token: 64 for inputs of 16 layers, 48 for gradients in an MLP in one piece,
    # and 12 for what convolutions kept then.
    assert Dtype(2).bytes(kept) / 1024 == pytest.approx(224 - 64 - 48 - 12, rel=0.05)


def test_every_storage_has_one_line():
    for config in MODELS.values():
        for index in range(config.num_layers):
            names = [kept.name for kept in layer(config, index)]
            assert len(names) == len(set(names))


def test_what_stays_is_known_to_the_layer_or_a_product():
    products = {"out", "o", "qkv", "xbc", "beta product", "dt product", "decay product"}
    products |= {"out of the window", "gate product of the window"}
    for config in MODELS.values():
        for index in range(config.num_layers):
            names = {kept.name for kept in layer(config, index)}
            assert {kept.name for kept in POLICIES["selective"](config, index)} <= names | products


def test_what_waits_for_other_ranks_of_the_log_linear_delta_rule():
    """Of each head whose turn it is not, between the halves of its backward; in Triton's interpreter, with one head."""
    op = pytest.importorskip("lasp.kernels.triton.log_linear_delta.op").TritonLogLinearDelta()
    tokens, size, device = 512, 32, "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, do = (torch.zeros(1, tokens, 1, size, dtype=torch.bfloat16, device=device) for _ in range(4))
    decay, beta, scales = (torch.zeros(1, tokens, 1, *more, device=device) for more in ((), (), (LEVELS,)))
    x = log_linear_delta_inputs(q, k, v, beta, decay, scales, scale=1.0).cut({}, Segments(1, tokens), (0,))
    _, partial = op.summarize(x, wanted=True)
    kept = op.finish(x, partial, Pending(lambda: None))[2]
    waiting = op.summarize_grad(x, kept, do, wanted=True)[1][2]

    model, long = replace(DENSE, mixer="log_linear_gated_delta_net", num_heads=8, head_dim=size), 2**18
    model = replace(model, value_head_dim=size)
    alone, exchanged = (_operation_gradients(model, 0, Dtype(2), long, exchanged) for exchanged in (False, True))
    bytes_of_a_head = sum({x.data_ptr(): x.nbytes() for x in map(Tensor.untyped_storage, _tensors(waiting))}.values())
    assert (exchanged - alone) / 7 == pytest.approx(bytes_of_a_head / tokens, rel=0.1)


def _tensors(x: object) -> list[Tensor]:
    """All that are in it."""
    if isinstance(x, Tensor):
        return [x]
    inside = x if isinstance(x, list | tuple) else vars(x).values() if hasattr(x, "__dict__") else ()
    return [tensor for each in inside for tensor in _tensors(each)]
