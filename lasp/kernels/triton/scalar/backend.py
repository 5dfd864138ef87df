"""Phase 3 of linear attention without gates or with scalar ones: which kernels walk the tiles, for what."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lasp.kernels.segments import Tiles
from lasp.kernels.triton.delta.ut_transform import CHUNK
from lasp.kernels.triton.device import GLUON
from lasp.kernels.triton.scalar.chunk_scan import walk
from lasp.kernels.triton.scalar.config import ScalarConfig
from lasp.kernels.triton.shared.state_passing import InitialStates

if GLUON:
    from lasp.kernels.triton.hopper.forward_scan import forward_scan
    from lasp.kernels.triton.hopper.reverse_scan import reverse_scan


@dataclass(frozen=True)
class Walks:
    """What all walks over the same tiles share.

    gates: see gates.cumulate. steepest: see states.tile_states. hopper: by the kernels for it, see config.for_hopper.
    """

    tiles: Tiles
    gates: Tensor | None
    steepest: Tensor | None
    scale: float
    config: ScalarConfig
    hopper: bool

    def __post_init__(self) -> None:
        if self.hopper and self.gates is not None and self.gates.ndim > 1:
            assert self.config.chunk == CHUNK, f"gates are summed within {self.config.chunk} tokens, not {CHUNK}"

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, entering: InitialStates) -> Tensor:
        """o [B, T, H, V], given the states that enter the tiles."""
        return self._up(q, k, v, entering, False, None, None)[0]

    def query_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, entering: InitialStates, ends: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """dq [B, T, H, K] for every value head. `ends` [M, H, K, V] asks for what a gate's gradient needs, too: it is
        filled with the states at the tiles' ends, and q · dq is given, [blocks, B, T, H]."""
        return self._up(do, v, k, entering, True, None if ends is None else q, ends)

    def key_value_grads(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, leaving: InitialStates, ends: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """dk and dv [B, T, H, K or V], given the gradients of the states that leave the tiles; with `ends` also v · dv
        [blocks, B, T, H] and the products of those states with their gradients [blocks, M, H]."""
        if self.hopper:
            return reverse_scan(self.tiles, q, k, v, do, self.gates, leaving, self.scale, ends)
        shared = self.gates, self.steepest, leaving, self.scale, self.config
        partner = None if ends is None else v
        dv, v_dv, at_end = walk(self.tiles, k, q, do, *shared, down=True, partner=partner, ends=ends)
        dk, _, _ = walk(self.tiles, v, do, q, *shared, down=True, transposed=True)
        return dk, dv, v_dv, at_end

    def _up(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        entering: InitialStates,
        transposed: bool,
        partner: Tensor | None,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        how: dict[str, Any] = {"transposed": transposed, "partner": partner, "ends": ends}
        if self.hopper:
            return forward_scan(self.tiles, a, b, c, self.gates, entering, self.scale, **how)
        return walk(self.tiles, a, b, c, self.gates, self.steepest, entering, self.scale, self.config, **how)[:2]
