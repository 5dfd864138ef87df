"""The model that a run begins with."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lasp.config import ModelConfig, TrainConfig, require
from lasp.models import Decoder, make_model
from lasp.models.recompute import POLICIES
from lasp.training import checkpoint

AnyDecoder = TypeVar("AnyDecoder", bound=Decoder)
Build = Callable[[TrainConfig, torch.device], Decoder]


def build_model(config: TrainConfig, device: torch.device) -> Decoder:
    return build_kind(make_model, config, device)


def build_kind(make: Callable[[ModelConfig], AnyDecoder], config: TrainConfig, device: torch.device) -> AnyDecoder:
    """The model with fresh weights, or with those of config.initial_weights, in float32 or float64."""
    with device:
        model = make(config.model)
    assert config.recompute in POLICIES, "what auto stands for is settled before"
    _require_able(model, config)
    model.recompute, model.recompute_layers = config.recompute, config.recompute_layers
    model.offload_activations = config.offload_activations
    if config.dtype == "float64":
        model.double()
    if config.initial_weights is not None:
        checkpoint.require_same_model(Path(config.initial_weights), config.model)
        checkpoint.load_model(config.initial_weights, model, on_all_ranks=True)
    return model


def _require_able(model: Decoder, config: TrainConfig) -> None:
    """Raises ValueError unless the model, which may be one's own, can be trained in segments and recompute if asked."""
    expected = "{} with a model_class that has no {} (one derived from lasp.models.Decoder has)"
    parts = [part for part in ("remember", "begin", "finish") if not hasattr(model, part)]
    segments = config.segment_tokens
    require(segments is None or not parts, "segment_tokens", segments, expected.format(None, ", ".join(parts)))
    able = config.recompute == "none" or hasattr(model, "recompute")
    require(able, "recompute", config.recompute, expected.format("'none'", "recompute"))
