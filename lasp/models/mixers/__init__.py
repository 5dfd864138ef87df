"""The layers that mix tokens: [B, T, hidden] -> [B, T, hidden], every step across tokens through `seq`."""

from torch import nn

from lasp.config import SOFTMAX, ModelConfig
from lasp.models.mixers.delta import DELTA_KINDS, DeltaMixer
from lasp.models.mixers.linear import LINEAR_KINDS, LinearMixer
from lasp.models.mixers.mamba2 import Mamba2Mixer
from lasp.models.mixers.softmax import SoftmaxMixer, WindowMixer, WithWindow

_CLASSES: dict[str, type[nn.Module]] = {
    **dict.fromkeys(LINEAR_KINDS, LinearMixer),
    **dict.fromkeys(DELTA_KINDS, DeltaMixer),
    "mamba2": Mamba2Mixer,
}


def make_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The mixer of the layer with that index: softmax attention or the linear one that `config.mixer` names, which may
    have a window of softmax attention beside it."""
    if config.layers[layer] == SOFTMAX:
        return SoftmaxMixer(config, layer)
    linear = _CLASSES[config.mixer](config, layer)
    return linear if config.window is None else WithWindow(linear, WindowMixer(config, layer))


__all__ = ["DeltaMixer", "LinearMixer", "Mamba2Mixer", "SoftmaxMixer", "WithWindow", "make_mixer"]
