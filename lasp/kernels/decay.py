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
        return _BY_RANK[0 if decay is None else decay.ndim]

    @property
    def learned(self) -> bool:
        """Whether it has a gradient."""
        return self in (Decay.SCALAR, Decay.DIAGONAL)


_BY_RANK = {0: Decay.NONE, 1: Decay.CONSTANT, 3: Decay.SCALAR, 4: Decay.DIAGONAL}
