"""The kernels of `diagonal` for Hopper."""

from dataclasses import dataclass

from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.triton.device import for_hopper
from lasp.kernels.triton.diagonal.portable import Portable
from lasp.kernels.triton.diagonal.rescale import Rescaled
from lasp.kernels.triton.hopper.diagonal_factors import rescale
from lasp.kernels.triton.hopper.diagonal_gradients import linear_gradients
from lasp.kernels.triton.hopper.diagonal_scan import diagonal_scan
from lasp.kernels.triton.shared.state_passing import InitialStates


def serves(x: LinearInputs) -> bool:
    """Whether these kernels do."""
    return for_hopper(x.k, x.v)


@dataclass(frozen=True)
class Hopper(Portable):
    """For heads of 128 in bf16."""

    def rescale(self, x: LinearInputs) -> Rescaled:
        assert x.decay is not None
        return rescale(self.tiles, x.q, x.k, x.decay, x.scale, self.config.max_ln_decay)

    def _scan(
        self, x: Rescaled, rows: tuple[Tensor, Tensor, Tensor], initial: InitialStates, y: Tensor,
        chunk_states: Tensor | None,
    ) -> None:  # fmt: skip
        diagonal_scan(self.tiles, x, rows, initial, y, chunk_states, self.config.max_ln_decay)

    def gradients(
        self, x: LinearInputs, rescaled: Rescaled, do: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return linear_gradients(self.tiles, x, do, rescaled, before, after, self.config.max_ln_decay)
