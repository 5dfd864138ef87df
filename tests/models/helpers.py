"""Small float64 models whose mixers weigh enough that an error in one of them shows in the logits."""

from dataclasses import replace

import torch
from torch import Tensor

from lasp.config import MIXERS, ModelConfig
from lasp.models import Decoder, SequenceOps, tiny
from lasp.parallel import SequenceParallel

# (mixer, pattern): every mixer alone, and hybrids
MODELS = [*((mixer, "L") for mixer in MIXERS), ("linear", "N"), ("gated_delta_net", "LLLN"), ("mamba2", "LN")]
VARIANTS = {
    "hedgehog": {"mixer": "gla", "feature_map": "hedgehog", "window": 5},
    "window": {"mixer": "gated_delta_net", "window": 1},
    "window of levels": {"mixer": "log_linear_mamba2", "window": 5},
    "convolved": {"mixer": "gla", "short_conv": True},
    "no positions": {"rope_theta": None},
}
MODELS += [("hedgehog", "L"), ("window", "LN"), ("window of levels", "L"), ("convolved", "L"), ("no positions", "N")]


def config(mixer: str, pattern: str) -> ModelConfig:
    # Without the large epsilon the norm of a head's output is all but a sign where that output is small (a first
    # token's is (q·k) v): finite differences and low precision would measure how close to zero the inputs came.
    changes = {"mixer": "linear", **VARIANTS[mixer]} if mixer in VARIANTS else {"mixer": mixer}
    return replace(tiny(pattern=pattern), init_std=0.25, norm_eps=0.01, **changes)


def decoder(mixer: str, pattern: str) -> Decoder:
    return Decoder(config(mixer, pattern)).double()


def sequence(tokens: int, cu_seqlens: Tensor | None = None) -> SequenceOps:
    """One rank's."""
    return SequenceParallel(None).sequence(tokens, cu_seqlens)


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape)


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every gradient to that fraction of its own largest entry."""
    for name, gradient in expected.items():
        error, size = (actual[name] - gradient).abs().max(), gradient.abs().max()
        assert size > 0, name
        assert error <= tolerance * size, f"{name}: off by {error} of {size}"
