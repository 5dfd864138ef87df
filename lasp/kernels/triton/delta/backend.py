"""What the delta rule asks of its kernels (see delta.op).

Two answer: `portable` everywhere, `hopper.delta` for the commonest heads on Hopper. Which, is chosen once a call.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.kernels.inputs import DeltaInputs
from lasp.kernels.triton.delta.rescale import Factors

MOST_ROUNDED = 4  # heads over which gradients of q and k are summed in their own dtype


class Terms(NamedTuple):
    """What is known of every chunk of C tokens without a state. ut: T of the UT transform [B, T, H, C]. gates: see
    ut_transform. scores: P [B, T, H, C], what each token reads of those of its chunk up to itself. log2_bounds: of a
    scalar gate, [chunks, H], by how much the chunk's transition may enlarge a state, as log2: its decay, and what keys
    that are too long for their beta add (shared.reach). factors: what reads and writes the state."""

    ut: Tensor
    gates: Tensor
    log2_bounds: Tensor | None
    scores: Tensor | None
    factors: Factors

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Those that backward does not find again."""
        return self[:4]


def summed_in_fp32(step: int) -> bool:
    """Whether sums over `step` heads, one by one, would lose too much in 16 bits. They begin with zero."""
    return step > MOST_ROUNDED


class Grads(NamedTuple):
    """dq, dk [B, T, H / step, K], sums over so many consecutive value heads, dv, the decay's if it is learned, and
    beta's."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_decay: Tensor | None
    d_beta: Tensor

    def are_added(self, heads: range) -> bool:
        """Whether dq and dk hold something already when those of `heads`, `step` apart, come."""
        return heads.start % heads.step > 0 or summed_in_fp32(heads.step)


class Recomputed(NamedTuple):
    """For some heads, or parts of them, of every chunk: u [B, T, heads, V] and the state it starts from
    [chunks, heads, V, K]."""

    u: Tensor
    states: Tensor

    def of(self, heads: int) -> "Recomputed":
        """The same memory, for as many heads or fewer."""
        (batch, tokens, most, value_dim), key_dim = self.u.shape, self.states.shape[-1]
        if heads == most:
            return self
        u, states = (x.flatten()[: x.numel() // most * heads] for x in self)
        return Recomputed(
            u.view(batch, tokens, heads, value_dim),
            states.view(self.states.shape[0], heads, value_dim, key_dim),
        )


class Backend(Protocol):
    """The steps of one call. heads: some of them, or of the parts they have (see op.Plan)."""

    adds_d_beta: bool  # beta's gradient is added up in fp32, from zero

    def terms(self, x: DeltaInputs) -> Terms:
        """What summaries need, early; `scores` may be missing."""

    def with_scores(self, x: DeltaInputs, terms: Terms) -> Terms:
        """All of them, once the summaries are on their way; `scores` may be unwritten until `outputs` has run."""

    def terms_again(
        self, x: DeltaInputs, ut: Tensor, gates: Tensor, log2_bounds: Tensor | None, scores: Tensor
    ) -> Terms:
        """All of them in backward, from those that were kept."""

    def tile_states(self, x: DeltaInputs, terms: Terms, states: Tensor, transitions: Tensor) -> None:
        """Fills S [M, H, K, V] and A [M, H, K, K] of every tile."""

    def outputs(self, x: DeltaInputs, terms: Terms, initial: Tensor | None, final: Tensor | None) -> Tensor:
        """o [B, T, H, V], a forward scan from the tiles' initial states; fills their `final` ones, if it is there."""

    def tile_states_grad(self, x: DeltaInputs, terms: Terms, do: Tensor, states: Tensor) -> None:
        """Fills D [M, H, K, V] of every tile."""

    def recompute(
        self, x: DeltaInputs, terms: Terms, initial: Tensor | None, heads: range, into: Recomputed, pdl: bool
    ) -> None:
        """Backward's forward scan of some heads. pdl: nothing it reads or writes has to do with the kernel before."""

    def gradients(
        self, x: DeltaInputs, terms: Terms, do: Tensor, recomputed: Recomputed, d_final: Tensor | None,
        d_initial: Tensor | None, heads: range, grads: Grads,
    ) -> None:  # fmt: skip
        """Fills `grads` for some heads, a reverse scan from the gradients of the tiles' final states; fills
        `d_initial`, those of their initial states, if it is there."""
