"""What implementations of log-linear attention are given."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.fenwick import most_slots
from lasp.kernels.inputs import Inputs
from lasp.kernels.segments import Segments


@dataclass(frozen=True)
class LogLinearInputs(Inputs):
    """One call. q, k [B, T, Hq, K], v [B, T, H, V], decay [B, T, H], level_scales [B, T, H, L].

    seen: of every segment, how many tokens its document has had before it; none, if nothing is said.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    level_scales: Tensor
    scale: float = field(kw_only=True)
    seen: tuple[int, ...] = field(kw_only=True, default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seen:
            object.__setattr__(self, "seen", (0,) * self.segments.count)

    def cut(self, tensors: dict[str, Tensor], segments: Segments, seen: tuple[int, ...]) -> "LogLinearInputs":
        """The same call, of these segments."""
        return replace(self.having(tensors, segments), seen=seen)

    @cached_property
    def tokens(self) -> Tensor:
        """[N] int64 on the host: `seen`."""
        return torch.tensor(self.seen, dtype=torch.long, device="cpu")

    @cached_property
    def tokens_after(self) -> Tensor:
        """[N] how many tokens their documents have had with the segments."""
        return self.tokens + self.segments.offsets.diff()

    @property
    def state_shape(self) -> tuple[int, int, int, int, int]:
        """[N, J, H, K, V] with as many slots as any of the segments needs."""
        return self.segments.count, most_slots(self.tokens_after), self.v.shape[2], self.k.shape[3], self.v.shape[3]


@dataclass(frozen=True)
class LogLinearDeltaInputs(LogLinearInputs):
    """Of the delta rule's form: beta [B, T, H] besides; decay may be None."""

    beta: Tensor = field(kw_only=True)
