"""What an implementation of log-linear attention is given, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lasp.kernels.fenwick import most_slots
from lasp.kernels.pending import Pending
from lasp.kernels.segments import Segments


@dataclass(frozen=True)
class LogLinearInputs:
    """One call. q, k [B, T, Hq, K], v [B, T, H, V], decay None or [B, T, H], level_scales [B, T, H, L], beta None or
    [B, T, H].

    seen: of every segment, how many tokens its document has had before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    level_scales: Tensor
    beta: Tensor | None
    scale: float
    segments: Segments
    seen: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those given, by name; all have an entry for every token."""
        names = ("q", "k", "v", "decay", "level_scales", "beta")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def having(self, tensors: Mapping[str, Tensor | None], segments: Segments | None = None) -> Self:
        """The same call with some other tensors (and segments)."""
        return replace(self, segments=segments or self.segments, **tensors)  # type: ignore[arg-type]

    def without_tensors(self) -> Self:
        """What is not a tensor: a frame for `having`."""
        return self.having(dict.fromkeys(self.tensors))

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

    @property
    def state_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs."""
        return torch.float64 if self.v.dtype == torch.float64 else torch.float32


class LogLinearGradients(NamedTuple):
    """Of the inputs, by their names, and, for whoever asks, of the slots that came in [N, J, H, K, V]."""

    of: dict[str, Tensor]
    incoming: Pending[Tensor]
