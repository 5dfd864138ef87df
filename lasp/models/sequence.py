"""What a model asks of the sequence that it is run on."""

from typing import Protocol

from torch import Tensor

from lasp.kernels.parts import Parts


class SupportsSum(Protocol):
    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks that share the sequence; no gradient."""
        ...


class SequenceOps(SupportsSum, Protocol):
    """The only operations of a model that look beyond a token; everything else is local to it.

    `lasp.parallel` makes such an object for every batch (one rank or many), and a past one for each call of a layer
    that has one (`lasp.models.past`). The tensors are this rank's T tokens, in its local order; shapes and meanings are
    those of the functions in `lasp.kernels`.
    """

    @property
    def positions(self) -> Tensor:
        """[T] int64, or [B, T] where rows differ: each token's position in its document."""
        ...

    @property
    def valid(self) -> Tensor:
        """[T] bool: False for the padding that gives every rank as many tokens."""
        ...

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def delta_product(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None = None, *, scale: float | None = None
    ) -> tuple[Tensor, Tensor | None]: ...

    def log_linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, level_scales: Tensor, *, scale: float | None = None
    ) -> tuple[Tensor, object]: ...

    def log_linear_delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, level_scales: Tensor, *,
        scale: float | None = None,
    ) -> tuple[Tensor, object]: ...  # fmt: skip

    def softmax_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None
    ) -> Tensor: ...

    def causal_conv1d(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def short_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, ...]: ...


class ShardedSequence(SequenceOps, Protocol):
    """A batch that also knows how it is split."""

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole x; ValueError unless x has as many tokens as the sequence."""
        ...
