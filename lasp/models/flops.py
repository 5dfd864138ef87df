"""How much arithmetic a model needs, for model FLOP utilisation."""

import math
from functools import cache

import torch
from torch import Tensor

from lasp.config import SOFTMAX, ModelConfig
from lasp.models.decoder import make_model
from lasp.models.features import feature_dim
from lasp.models.mixers import DELTA_KINDS


def count_parameters(config: ModelConfig) -> int:
    """All parameters, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in make_model(config).parameters())


def count_active_parameters(config: ModelConfig) -> int:
    """The parameters that one token meets: of a mixture's experts, those that it goes to. Tied ones once."""
    with torch.device("meta"):
        return sum(_active(p, config) for p in make_model(config).parameters())


@cache  # it makes a model to count its parameters, and a training loop asks in every step
def flops_per_token(config: ModelConfig, context_length: int) -> float:
    """FLOPs that training needs per token of a context of `context_length` tokens, forward and backward.

        6 P + 3 Σ_layers H a        a = T (K + K)    softmax, causal: a token sees T / 2 others on average
                                        4 K V        linear classes: write to and read from the state
                                        6 K V        delta family: erase as well; 4 K V more for each further step
                                        (2 + log2 T) K V    log-linear: half of log2 T states are read; 2 more where
                                                            the delta rule erases
                                        4 W K        besides, for a window of W tokens

    P counts the parameters that multiply every token: matrices, convolutions and the head, but not the embedding's
    lookup, norms and vectors, nor experts that the token does not go to. The forward terms a are those of math §9
    without the share that depends on an implementation's chunk size; backward counts twice the forward, and nothing
    that is recomputed counts (model FLOPs, not hardware FLOPs).
    """
    with torch.device("meta"):
        model = make_model(config)
    multiplying = sum(_active(p, config) for p in model.parameters() if p.ndim >= 2)
    if not config.tie_embeddings:
        multiplying -= model.embedding.weight.numel()
    written = 4 * config.steps if config.plain_mixer in DELTA_KINDS else 2
    read = math.log2(context_length) if config.aligned else 2
    state = (written + read) * feature_dim(config) * config.value_dim
    state += 4 * (config.window or 0) * config.key_dim
    attention = sum(context_length * 2 * config.key_dim if letter == SOFTMAX else state for letter in config.layers)
    return 6.0 * multiplying + 3.0 * config.num_heads * attention


def _active(parameter: Tensor, config: ModelConfig) -> int:
    """How many of a parameter's elements a token meets: all but those of stacks of experts, of 3 dimensions."""
    if parameter.ndim < 3:
        return parameter.numel()
    return parameter.numel() // config.num_experts * config.experts_per_token
