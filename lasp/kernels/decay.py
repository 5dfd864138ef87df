"""The classes of decay (math §2)."""

from enum import IntEnum

from torch import Tensor


class Decay(IntEnum):
    """Of a token. An op's `decay` argument tells it by its rank."""

    NONE = 0  # None
    CONSTANT = 1  # [H]
    SCALAR = 2  # [B, T, H]
    DIAGONAL = 3  # [B, T, H, K]

    @classmethod
    def of(cls, decay: Tensor | None) -> "Decay":
        return cls.NONE if decay is None else {1: cls.CONSTANT, 3: cls.SCALAR, 4: cls.DIAGONAL}[decay.ndim]

    @property
    def learned(self) -> bool:
        """Whether it has a gradient."""
        return self in (Decay.SCALAR, Decay.DIAGONAL)
