"""What ops with a recurrent state are given: one class for each op, which names its tensors."""

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.decay import Decay
from lasp.kernels.dtypes import accumulation_dtype
from lasp.kernels.segments import Segments


@dataclass(frozen=True)
class Inputs:
    """What one call of an op was given. A subclass names the op's tensors as fields; None is one left out.

    segments: which tokens share a state; the rows of the batch, if nothing is said.
    """

    segments: Segments = field(kw_only=True, default=None)  # type: ignore[assignment]  # never None afterwards

    def __post_init__(self) -> None:
        if self.segments is None:
            batch, tokens = next(iter(self.per_token.values())).shape[:2]
            object.__setattr__(self, "segments", Segments(batch, tokens))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Those given, by name."""
        own = vars(self)
        return {name: x for name in self.__dataclass_fields__ if isinstance(x := own.get(name), Tensor)}

    @property
    def per_token(self) -> dict[str, Tensor]:
        """Those of them with an entry for every token, [B, T, ...]."""
        return self.tensors

    @property
    def options(self) -> dict[str, object]:
        """What else it was given, by name: equal on all ranks."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "segments"}
        return {name: x for name, x in values.items() if not isinstance(x, Tensor)}

    def having(self, tensors: dict[str, Tensor], segments: Segments | None = None) -> Self:
        """The same call with some other tensors (and segments)."""
        made = object.__new__(type(self))  # dataclasses.replace takes 5 µs of the host
        own = vars(self)
        made.__dict__.update({name: own[name] for name in self.__dataclass_fields__ if name in own})  # nothing cached
        made.__dict__.update(tensors, segments=segments or self.segments)
        return made

    def without_tensors(self) -> Self:
        """What is not a tensor: a frame for `having`."""
        nothing: dict[str, Any] = dict.fromkeys(self.tensors)
        return self.having(nothing)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """[N, H, K, V] of all segments' states."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def state_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs."""
        return accumulation_dtype(next(iter(self.tensors.values())))


@dataclass(frozen=True)
class LinearInputs(Inputs):
    """Of `lasp.kernels.linear_attention`: q, k [B, T, Hq, K], v [B, T, H, V], decay None, [H], [B, T, H] or
    [B, T, H, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    scale: float = field(kw_only=True)
    causal: ClassVar[bool] = True

    @property
    def options(self) -> dict[str, object]:
        return super().options | {"causal": self.causal}

    @property
    def decay_class(self) -> Decay:
        return Decay.of(self.decay)

    @property
    def per_token(self) -> dict[str, Tensor]:
        constant = self.decay_class == Decay.CONSTANT
        return {name: x for name, x in self.tensors.items() if not (constant and name == "decay")}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.segments.count, self.v.shape[2], self.k.shape[3], self.v.shape[3]


@dataclass(frozen=True)
class NonCausalInputs(LinearInputs):
    """The same with causal=False; decay is None."""

    causal = False


@dataclass(frozen=True)
class DeltaInputs(LinearInputs):
    """Of `lasp.kernels.delta_rule`: beta [B, T, H] besides."""

    beta: Tensor = field(kw_only=True)


@dataclass(frozen=True)
class DeltaProductInputs(Inputs):
    """Of `lasp.kernels.delta_product`: q [B, T, Hq, K], k [B, T, n, Hq, K], v [B, T, n, H, V], decay None, [B, T, H] or
    [B, T, H, K], beta [B, T, n, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor
    scale: float = field(kw_only=True)

    @property
    def count(self) -> int:
        """n, the steps of a token."""
        return self.k.shape[2]

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.segments.count, self.v.shape[3], self.k.shape[4], self.v.shape[4]

    def step(self, j: int) -> DeltaInputs:
        """The delta rule of every token's j-th step alone."""
        k, v, beta = (x.select(2, j) for x in (self.k, self.v, self.beta))
        decay = self.decay if j == 0 else None
        return DeltaInputs(self.q, k, v, decay, beta=beta, scale=self.scale, segments=self.segments)

    def steps(self) -> DeltaInputs:
        """The delta rule of all steps, one token each: the first of a token's decays, the last reads."""
        others = self.count - 1
        q, decay = pad(self.q[:, :, None], (0, 0, 0, 0, others, 0)).flatten(1, 2), self.decay
        if decay is not None:
            decay = pad(decay[:, :, None], (0, 0) * (decay.ndim - 2) + (0, others)).flatten(1, 2)
        k, v, beta = (x.flatten(1, 2) for x in (self.k, self.v, self.beta))
        segments = self.segments.times(self.count)
        return DeltaInputs(q, k, v, decay, beta=beta, scale=self.scale, segments=segments)
