"""The layers that mix tokens: [B, T, hidden] -> [B, T, hidden], every step across tokens through `seq`."""

from torch import nn

from lasp.config import SOFTMAX, ModelConfig
from lasp.models.mixers.delta import DELTA_KINDS, DeltaMixer, DeltaProductMixer
from lasp.models.mixers.linear import LINEAR_KINDS, LinearMixer
from lasp.models.mixers.log_linear import LogLinearDeltaMixer, LogLinearMamba2Mixer
from lasp.models.mixers.mamba2 import Mamba2Mixer
from lasp.models.mixers.softmax import SoftmaxMixer, WindowMixer, WithWindow
from lasp.own import load_own

_CLASSES: dict[str, type[nn.Module]] = {
    **dict.fromkeys(LINEAR_KINDS, LinearMixer),
    **dict.fromkeys(DELTA_KINDS, DeltaMixer),
    "gated_delta_product": DeltaProductMixer,
    "mamba2": Mamba2Mixer,
    "log_linear_mamba2": LogLinearMamba2Mixer,
    "log_linear_gated_delta_net": LogLinearDeltaMixer,
}


def make_mixer(config: ModelConfig, layer: int) -> nn.Module:
    """The mixer of the layer with that index: softmax attention or the linear one that `config.mixer` names, which may
    have a window of softmax attention beside it.

    Raises ValueError if that is a class of one's own that is not there.
    """
    if config.layers[layer] == SOFTMAX:
        return SoftmaxMixer(config, layer)
    linear = (_CLASSES.get(config.mixer) or load_own("mixer", config.mixer))(config, layer)
    return linear if config.window is None else WithWindow(linear, WindowMixer(config, layer))


__all__ = [
    "DeltaMixer",
    "DeltaProductMixer",
    "LinearMixer",
    "LogLinearDeltaMixer",
    "LogLinearMamba2Mixer",
    "Mamba2Mixer",
    "SoftmaxMixer",
    "WithWindow",
    "make_mixer",
]
