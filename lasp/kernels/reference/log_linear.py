"""Log-linear attention in chunks (math §4): what runs on a CPU, and what the device kernels are measured against.

Chunks are cut at positions within documents that C divides, so that all earlier tokens of a slot have one level for all
queries of a chunk. A chunk is the same affine map as in `reference.chunk`, of every slot X^(j) that enters it:

    o = Σ_j λ^(j) R X^(j) + (P ⊙ Λ) v        P [C, C] what outputs read of v if all levels have the scale 1
    X' = A route(X) + S                      S^(j) of the chunk's tokens that belong to slot j behind it

with λ^(j) [C] the scales of the levels at which its queries see slot j, Λ [C, C] those at which they see each other.

Across chunks the slots are scanned, backward their gradients; what is local to a chunk is left to autograd.
"""

from typing import Any

import torch
from torch import Tensor

from lasp.kernels.fenwick import (
    fitted,
    level,
    moved,
    moved_back,
    occupied,
    own_slots,
    routes,
    starts,
)
from lasp.kernels.log_linear_inputs import LogLinearGradients, LogLinearInputs
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Kept
from lasp.kernels.reference.chunk import CHUNK, read, write
from lasp.kernels.segments import Chunks
from lasp.kernels.summary import SHUT, Summary, apply, apply_transposed

Steps = list[tuple[Tensor, Tensor]]  # the segments that have an i-th chunk, and those chunks


class LogLinearOp:
    """log_linear_attention and log_linear_delta_rule: `beta` makes the difference. The halves of recurrence.Op, with
    states [N, J, H, K, V] and transitions [N, 1, H] or [N, 1, H, K, K]."""

    def summarize(self, x: LogLinearInputs, wanted: bool):
        cut = Cut(x)
        local = cut.local(x, cut.leaves(x))
        summary = None
        if wanted:
            start = x.v.new_zeros(x.state_shape, dtype=x.state_dtype)
            summary = Summary(cut.scan(local["a"], local["s"], start)[1], cut.total(local["a"], start))
        return summary, (cut, local)

    def finish(self, x: LogLinearInputs, partial, incoming: Pending[Tensor | None]) -> tuple[Tensor, Pending, Kept]:
        cut, local = partial
        start = cut.slots_of(x, incoming.wait(), x.tokens)
        entering, outgoing = cut.scan(local["a"], local["s"], start)
        o = local["y"] + torch.einsum("mjhck,mjhkv->mhcv", local["r"], entering)
        return cut.chunks.join(o, x.v).to(x.v.dtype), Pending(lambda: outgoing), (start,)

    def summarize_grad(self, x: LogLinearInputs, kept: Kept, do: Tensor, wanted: bool):
        cut, start = Cut(x), kept[0]
        assert start is not None
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in cut.leaves(x).items()}
        with torch.enable_grad():
            local = cut.local(x, leaves)
        do = cut.chunks.split(do).to(x.state_dtype)
        d = local["r"].detach().mT @ do[:, None]
        total = cut.scan_back(cut.detached(local["a"]), d, torch.zeros_like(start))[1] if wanted else None
        return total, (cut, leaves, local, do, d, start)

    def finish_grad(
        self, x: LogLinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]
    ) -> LogLinearGradients:
        cut, leaves, local, do, d, start = partial
        a = cut.detached(local["a"])
        entering, _ = cut.scan(a, local["s"].detach(), start)
        leaving, d_incoming = cut.scan_back(a, d, cut.slots_of(x, d_outgoing.wait(), x.tokens_after))
        grads = {"r": do[:, None] @ entering.mT, "y": do, "s": leaving}
        if a is not None:
            grads["a"] = _transition_grad(a, moved(entering, cut.routes), leaving)
        found = torch.autograd.grad(
            [local[name] for name in grads], list(leaves.values()), list(grads.values()), materialize_grads=True
        )
        of = {
            name: cut.chunks.join(grad, x.v).to(getattr(x, name).dtype)
            for name, grad in zip(leaves, found, strict=True)
        }
        return LogLinearGradients(of, Pending(lambda: d_incoming))


class Cut:
    """The segments' tokens in M chunks, and where these stand in their documents."""

    def __init__(self, x: LogLinearInputs):
        offsets, seen, device = x.segments.offsets, x.tokens, x.v.device
        head = torch.minimum(-seen % CHUNK, offsets.diff())  # up to a place where chunks may begin
        cuts = torch.stack([offsets[:-1], offsets[:-1] + head], 1).flatten()
        self.chunks = Chunks(torch.cat([cuts, offsets[-1:]]), CHUNK, device)
        owner = self.chunks.owner.cpu() // 2
        counts = owner.bincount(minlength=x.segments.count)
        first = counts.cumsum(0) - counts
        active = [(counts > i).nonzero()[:, 0] for i in range(int(counts.max()) if len(counts) else 0)]
        self.steps: Steps = [(n.to(device), (first[n] + i).to(device)) for i, n in enumerate(active)]

        token = torch.arange(x.segments.batch * x.segments.tokens, device="cpu")
        segment = torch.repeat_interleave(offsets.diff())
        position = (token - offsets[segment] + seen[segment]).view(*x.v.shape[:2], 1).to(device)
        self.position = self.chunks.split(position)[:, 0]  # [M, C]
        self.begin = self.position[:, 0]
        end = self.begin + self.chunks.mask.sum(1)
        self.slots = x.state_shape[1]
        self.routes = routes(self.begin, end, self.slots)
        self.own = own_slots(self.position, end, self.slots) & self.chunks.mask[..., None]  # [M, C, J]
        self.reads = self.chunks.mask[..., None] & occupied(self.begin, self.slots)[:, None]

    def slots_of(self, x: LogLinearInputs, slots: Tensor | None, tokens: Tensor) -> Tensor:
        """[N, J, H, K, V], those of so many tokens; zero if there are none."""
        if slots is None:
            return x.v.new_zeros(x.state_shape, dtype=x.state_dtype)
        return fitted(slots, tokens, self.slots)

    def leaves(self, x: LogLinearInputs) -> dict[str, Tensor]:
        return {name: self.chunks.split(t).to(x.state_dtype) for name, t in x.tensors.items()}

    def local(self, x: LogLinearInputs, leaves: dict[str, Tensor]) -> dict[str, Any]:
        """Of each chunk: a and s [M, J, H, K, V], its map of slots; r [M, J, H, C, K], what outputs read of those that
        enter it, and y [M, H, C, V], what they read of the chunk itself."""
        heads, v = x.v.shape[2], leaves["v"]
        q, k = (leaves[name].repeat_interleave(heads // leaves[name].shape[1], dim=1) for name in ("q", "k"))
        g, scales, beta = leaves.get("decay"), leaves["level_scales"], leaves.get("beta")
        b = None if g is None else g.clamp(min=SHUT[x.state_dtype]).double().cumsum(2)
        eye = torch.eye(CHUNK, dtype=v.dtype, device=v.device).expand(*v.shape[:3], CHUNK)
        a, written, u, w = write(k, eye, b, beta)  # of v = I, so that the tokens stay apart
        r, p = read(q * x.scale, k, b, u, w)
        among = _at(scales, level(self.position[:, :, None], self.position[:, None]))
        earlier = level(self.position[:, :, None], starts(self.begin, self.slots)[:, None])
        read_scales = _at(scales, earlier.where(self.reads, 0)) * self.reads[:, None]  # [M, H, C, J]
        return {
            "a": None if a is None else a[:, None],
            "s": (written[:, None] * self.own.mT[:, :, None, None]) @ v[:, None],
            "r": read_scales.movedim(3, 1)[..., None] * r[:, None],
            "y": (p * among) @ v,
        }

    @staticmethod
    def detached(a: Tensor | None) -> Tensor | None:
        return None if a is None else a.detach()

    def scan(self, a: Tensor | None, s: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The slots that enter each chunk [M, J, H, K, V] and those that leave the segments [N, J, H, K, V]."""
        entering, state = torch.empty_like(s), start.clone()
        for segment, chunk in self.steps:
            entering[chunk] = state[segment]
            passed = moved(state[segment], self.routes[chunk])
            state[segment] = apply(None if a is None else a[chunk], passed) + s[chunk]
        return entering, state

    def scan_back(self, a: Tensor | None, d: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The mirror image: the gradients of each chunk's outgoing slots and of the segments' incoming ones."""
        leaving, grad = torch.empty_like(d), end.clone()
        for segment, chunk in reversed(self.steps):
            leaving[chunk] = grad[segment]
            passed = apply_transposed(None if a is None else a[chunk], grad[segment])
            grad[segment] = moved_back(passed, self.routes[chunk]) + d[chunk]
        return leaving, grad

    def total(self, a: Tensor | None, like: Tensor) -> Tensor | None:
        """The product of each segment's transitions, [N, 1, H] or [N, 1, H, K, K]."""
        if a is None:
            return None
        if a.ndim == 3:
            total = a.new_zeros(len(like), *a.shape[1:])
            for segment, chunk in self.steps:
                total[segment] += a[chunk]
            return total
        total = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(len(like), *a.shape[1:]).clone()
        for segment, chunk in self.steps:
            total[segment] = a[chunk] @ total[segment]
        return total


def _at(scales: Tensor, levels: Tensor) -> Tensor:
    """scales [M, H, C, L] at levels [M, C, D]; places without a token have some level that there is."""
    return scales.gather(-1, levels.clamp(max=scales.shape[-1] - 1)[:, None].expand(-1, scales.shape[1], -1, -1))


def _transition_grad(a: Tensor, moved_in: Tensor, leaving: Tensor) -> Tensor:
    """∂L/∂A = Σ_j G^(j) X^(j)ᵀ, through the exponential where A is a logarithm; a [M, 1, H] or [M, 1, H, K, K]."""
    if a.ndim == moved_in.ndim:
        return (leaving @ moved_in.mT).sum(1, keepdim=True)
    return (apply(a, moved_in) * leaving).sum((1, 3, 4))[:, None]
