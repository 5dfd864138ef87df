"""The kernels of `diagonal` for any GPU; `hopper.diagonal` has others for the commonest heads on Hopper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.inputs import LinearInputs
from lasp.kernels.segments import Tiles
from lasp.kernels.triton.diagonal.gradients import gradients
from lasp.kernels.triton.diagonal.outputs import scan_outputs
from lasp.kernels.triton.diagonal.rescale import DiagonalConfig, Rescaled, rescale
from lasp.kernels.triton.shared.state_passing import InitialStates


@dataclass(frozen=True)
class Portable:
    """Those steps of a call of which there is more than one kind. All leave what tokens of secondary chunks give each
    other to `secondary`."""

    tiles: Tiles
    config: DiagonalConfig

    def rescale(self, x: LinearInputs) -> Rescaled:
        assert x.decay is not None
        return rescale(self.tiles, x.q, x.k, x.decay, x.scale, self.config)

    def outputs(self, x: LinearInputs, rescaled: Rescaled, initial: InitialStates) -> Tensor:
        """o [B, T, H, V]."""
        o = torch.empty_like(x.v)
        self._scan(rescaled, (rescaled.q, rescaled.k, x.v), initial, o, None)
        return o

    def value_grads(self, rescaled: Rescaled, do: Tensor, d_final: InitialStates) -> tuple[Tensor, Tensor]:
        """dv [B, T, H, V], and G̃ of every chunk, [slots, H, K, V] in the operands' dtype, from the gradients of the
        states that leave the tiles."""
        dv, grads = torch.empty_like(do), rescaled.q.new_empty(*rescaled.ln_ends.shape, do.shape[3])
        self._scan(rescaled, (rescaled.k, rescaled.q, do), d_final, dv, grads)
        return dv, grads

    def _scan(
        self, x: Rescaled, rows: tuple[Tensor, Tensor, Tensor], initial: InitialStates, y: Tensor,
        chunk_states: Tensor | None,
    ) -> None:  # fmt: skip
        scan_outputs(self.tiles, x, rows, initial, y, chunk_states, self.config)

    def gradients(
        self, x: LinearInputs, rescaled: Rescaled, do: Tensor, before: Tensor, after: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq and dk [B, T, H, K], of every value head and in the places of q̃ and k̃, and the decay's gradient, from X̃
        and G̃ of every chunk."""
        assert x.decay is not None
        return gradients(self.tiles, rescaled, x.v, x.decay, do, before, after, x.scale, self.config)
