"""Final slots of segments and their gradients, in PyTorch: they are few. A slot is what the last leaf's tokens wrote
into it, or a node that this leaf's next token would see; E, the transition from there to the segment's end, begins as
the last leaf's and becomes E A of each node that is passed, as rows do (reads)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.fenwick import own_slots
from lasp.kernels.lasting import kept
from lasp.kernels.leaves import NONE, cut, heights
from lasp.kernels.log_linear_inputs import LogLinearDeltaInputs
from lasp.kernels.parked import to_device
from lasp.kernels.reference.chunk import write
from lasp.kernels.summary import SHUT
from lasp.kernels.triton.shared.tiles import CHUNK

LOG_CHUNK = CHUNK.bit_length() - 1


class Sight(NamedTuple):
    """Of one height: its slot, the segments whose end sees a node there, that node, and its pair."""

    slot: int
    segment: Tensor
    node: Tensor
    pair: Tensor


@dataclass(frozen=True)
class Finals:
    """token, mask: [N, C] the last leaves' places. held: those of N · C that hold a token. has_tokens: whether there
    are any. own: [N, C, LOG_CHUNK] the slot that each belongs to."""

    token: Tensor
    mask: Tensor
    has_tokens: bool
    held: Tensor
    own: Tensor
    sights: tuple[Sight, ...]

    def tokens(self, x: LogLinearDeltaInputs) -> dict[str, Tensor]:
        """k, v, beta and decay of the last leaves, [N, H, C, ...] in fp32, zero where there is no token."""
        found = {}
        for name in ("k", "v", "beta", "decay"):
            rows = getattr(x, name).flatten(0, 1)[self.token].float()
            found[name] = rows.where(self.mask.view(*self.mask.shape, *(1,) * (rows.ndim - 2)), 0).transpose(1, 2)
        return found

    def add_tokens(self, to: Tensor, grad: Tensor) -> Tensor:
        """to [B, T, H, ...] with what the last leaves' tokens get besides, [N, H, C, ...]."""
        rows = grad.transpose(1, 2).flatten(0, 1)[self.held]
        return to.flatten(0, 1).index_add(0, self.token.flatten()[self.held], rows.to(to.dtype)).view(to.shape)

    def nodes(self, x: Tensor) -> list[Tensor]:
        """Those that are seen at each height, of [nodes, H, ...]."""
        return [x[sight.node] for sight in self.sights]

    def slots(self, tokens: dict[str, Tensor], states: list[Tensor], transitions: list[Tensor], count: int) -> Tensor:
        """[N, count, H, K, V] if nothing comes in."""
        k, v = tokens["k"], tokens["v"]
        k = k.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
        eye = torch.eye(CHUNK, dtype=v.dtype, device=v.device).expand(*v.shape[:3], CHUNK)
        nothing = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
        slots = [nothing] * max(count, LOG_CHUNK)
        if self.has_tokens:
            b = tokens["decay"].clamp(min=SHUT[torch.float32]).double().cumsum(2)
            end, written, _, _ = write(k, eye, b, tokens["beta"])
            slots[:LOG_CHUNK] = [(written * mask[:, None, None]) @ v for mask in self.own.unbind(-1)]
        else:
            end = torch.eye(k.shape[-1], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        for (slot, segment, _, _), state, transition in zip(self.sights, states, transitions, strict=True):
            before = end[segment]
            slots[slot] = slots[slot].index_copy(0, segment, before @ state)
            end = end.index_copy(0, segment, before @ transition)
        return torch.stack(slots[:count], 1)


def finals_of(x: LogLinearDeltaInputs) -> Finals:
    return _finals(tuple(x.segments.offsets.tolist()), x.seen, x.v.device)


@kept(64)
def _finals(offsets: tuple[int, ...], seen: tuple[int, ...], device: torch.device) -> Finals:
    offset, before = torch.tensor(offsets, device="cpu"), torch.tensor(seen, device="cpu")
    leaves = cut(offset, before, CHUNK)
    last, place, found = leaves.last, torch.arange(CHUNK, device="cpu"), heights(leaves)[0]
    mask = (place >= leaves.skipped[last][:, None]) & (place < leaves.stop[last][:, None])
    own = own_slots(leaves.number[last][:, None] * CHUNK + place, before + offset.diff(), LOG_CHUNK)
    lefts = torch.cat([height.left for height in found]) if found else last[:0]
    sights = []
    for slot, height in enumerate(found, LOG_CHUNK):
        pair = height.seen[last]
        if len(segment := (pair != NONE).nonzero()[:, 0]):
            sights.append(
                Sight(slot, *(to_device(part, device) for part in (segment, lefts[pair[segment]], pair[segment])))
            )
    return Finals(
        token=to_device((leaves.start[last][:, None] + place).where(mask, 0), device),
        mask=to_device(mask, device),
        has_tokens=bool(mask.any()),
        held=to_device(mask.flatten().nonzero()[:, 0], device),
        own=to_device(own & mask[..., None], device),
        sights=tuple(sights),
    )
