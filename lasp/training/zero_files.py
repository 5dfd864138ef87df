"""What DeepSpeed's ZeRO leaves in a checkpoint, read without its engine."""

from pathlib import Path

import torch
from torch import Tensor

from lasp.training.storage import only_data


def load_weights(path: Path, stage: int) -> dict[str, Tensor]:
    """A checkpoint's whole weights by name, float32, put together on this process."""
    if stage == 0:
        with only_data(path):
            return torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with only_data(path, *saved_classes()):
        return get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)


def saved_classes() -> tuple[type, ...]:
    """Those of DeepSpeed whose instances it saves beside tensors; they hold numbers."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return LossScaler, ZeroStageEnum, fragment_address
