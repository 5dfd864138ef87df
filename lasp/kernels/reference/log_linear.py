"""Log-linear attention in chunks (math §4): what runs on a CPU, and what the device kernels are measured against.

Chunks are the leaves of a tree over positions (lasp.kernels.leaves). A chunk is the same affine map of a state X that
enters it as in `reference.chunk`, but that its outputs weigh levels:

    o = λ R X + (P ⊙ Λ) v        P [C, C] what outputs read of v if all levels have the scale 1, Λ [C, C] the scales of
    X' = A X + S                 the levels at which its tokens see each other, λ [C] those at which they see X

1. From the leaves up a parent is what its children are one after the other: A = A_right A_left, S = A_right S_left +
   S_right.
2. Again from the leaves up, what queries see at one level is the S of a left sibling: o += λ R S_left. Then R becomes
   R A_left, what they read of a state that enters the left sibling.
3. So in the end R X is what outputs read, without their λ, of what has entered the segment. Final slots are read like
   outputs, by the last chunk's A in the place of R.

Backward leaves all of this to autograd; by hand go what enters and leaves the segments.
"""

from typing import Any

import torch
from torch import Tensor

from lasp.kernels.fenwick import fitted, level, most_slots, moved, moved_back, occupied, own_slots, routes, starts
from lasp.kernels.leaves import NONE, cut, heights
from lasp.kernels.log_linear_inputs import LogLinearInputs
from lasp.kernels.parked import to_device
from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Gradients, Kept
from lasp.kernels.reference.chunk import CHUNK, read, write
from lasp.kernels.summary import SHUT, Summary, Transition, apply, apply_transposed, compose

LOG_CHUNK = CHUNK.bit_length() - 1


class LogLinearOp:
    """log_linear_attention and log_linear_delta_rule: `beta` makes the difference. The halves of recurrence.Op, with
    states [N, J, H, K, V] and transitions [N, 1, H] or [N, 1, H, K, K]."""

    def summarize(self, x: LogLinearInputs, wanted: bool):
        call = Call(x)
        made = call.run(call.leaves())
        return Summary(made["slots"], made["a"]) if wanted else None, (call, made)

    def finish(self, x: LogLinearInputs, partial, incoming: Pending[Tensor | None]) -> tuple[Tensor, Pending, Kept]:
        call, made = partial
        start = call.initial(incoming.wait())
        o = made["o"] + torch.einsum("mjhck,mjhkv->mhcv", made["r"], start[call.owner])

        def outgoing() -> Tensor:
            return made["slots"] + apply(made["a"], moved(fitted(start, x.tokens, call.slots), call.routes))

        return call.join(o).to(x.v.dtype), Pending(outgoing), (start,)

    def summarize_grad(self, x: LogLinearInputs, kept: Kept, do: Tensor, wanted: bool):
        call = Call(x)
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in call.leaves().items()}
        with torch.enable_grad():
            made = call.run(leaves)
        do = call.split(do).to(x.state_dtype)
        of_chunks = made["r"].detach().mT @ do[:, None]
        d = of_chunks.new_zeros(x.segments.count, *of_chunks.shape[1:]).index_add(0, call.owner, of_chunks)
        return fitted(d, x.tokens, call.slots) if wanted else None, (call, leaves, made, do, d, kept[0])

    def finish_grad(self, x: LogLinearInputs, kept: Kept, partial, d_outgoing: Pending[Tensor | None]) -> Gradients:
        call, leaves, made, do, d, start = partial
        grads = {"o": do, "r": do[:, None] @ start[call.owner].mT}
        if (end := d_outgoing.wait()) is not None:
            end = fitted(end, x.tokens_after, call.slots)
            grads["slots"] = end
            a, entered = made["a"], moved(fitted(start, x.tokens, call.slots), call.routes)
            if a is not None:
                grads["a"] = _transition_grad(a.detach(), entered, end)
            passed = moved_back(apply_transposed(None if a is None else a.detach(), end), call.routes)
            d = d + passed[:, : d.shape[1]]
        outputs = [made[name] for name in grads]
        found = torch.autograd.grad(outputs, list(leaves.values()), list(grads.values()), materialize_grads=True)
        pairs = zip(leaves, found, strict=True)
        of = {name: call.join(grad).to(getattr(x, name).dtype) for name, grad in pairs}
        return Gradients(of, Pending(lambda: fitted(d, x.tokens, call.slots)))


class Call:
    """The segments' tokens in M chunks, [M, H, C, ...], and where these stand in their documents."""

    def __init__(self, x: LogLinearInputs):
        self.x, self.slots, device = x, x.state_shape[1], x.v.device
        chunks = cut(x.segments.offsets, x.tokens, CHUNK)
        place = torch.arange(CHUNK, device="cpu")
        mask = (place >= chunks.skipped[:, None]) & (place < chunks.stop[:, None])
        self.mask = to_device(mask, device)  # [M, C]
        self.token = to_device((chunks.start[:, None] + place).where(mask, 0), device)
        self.position = to_device(chunks.number[:, None] * CHUNK + place, device)
        self.among = to_device(level(place[:, None], place[None, :]), device)
        self.owner, self.last = to_device(chunks.owner, device), to_device(chunks.last, device)
        self.before, self.after = to_device(x.tokens, device), to_device(x.tokens_after, device)
        self.routes = routes(self.before, self.after, self.slots)

        found, roots = heights(chunks)
        lefts = torch.cat([height.left for height in found]) if found else roots[:0]
        self.roots = to_device(roots, device)
        self.siblings = [(to_device(height.left, device), to_device(height.right, device)) for height in found]
        self.steps = []  # of every height: chunks and what they see, segments and what their last chunks see
        for seen in (height.seen for height in found):
            sights = [(of != NONE, of) for of in (seen, seen[chunks.last])]
            self.steps.append(
                [to_device(part, device) for some, of in sights for part in (some.nonzero()[:, 0], lefts[of[some]])]
            )

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [M, H, C, ...], zero where there is no token."""
        chunks = x.flatten(0, 1)[self.token]
        return chunks.where(self.mask.view(*self.mask.shape, *(1,) * (chunks.ndim - 2)), 0).transpose(1, 2)

    def join(self, chunks: Tensor) -> Tensor:
        """The inverse of `split`; chunks are in the order of tokens."""
        return chunks.transpose(1, 2)[self.mask].unflatten(0, self.x.v.shape[:2])

    def initial(self, slots: Tensor | None) -> Tensor:
        """[N, J0, H, K, V]: as many as hold what came before."""
        count, (segments, _, *state) = most_slots(self.x.tokens), self.x.state_shape
        if slots is None:
            return self.x.v.new_zeros(segments, count, *state, dtype=self.x.state_dtype)
        return fitted(slots, self.x.tokens, count)

    def leaves(self) -> dict[str, Tensor]:
        return {name: self.split(t).to(self.x.state_dtype) for name, t in self.x.tensors.items()}

    def run(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        """o [M, H, C, V] and the final slots [N, J, H, K, V] if nothing comes in, the segments' transitions a, and
        r [M, J0, H, C, K], what outputs read of initial slots."""
        x, v, scales = self.x, leaves["v"], leaves["level_scales"]
        q, k = (leaves[name].repeat_interleave(x.v.shape[2] // leaves[name].shape[1], dim=1) for name in ("q", "k"))
        g = leaves.get("decay")
        b = None if g is None else g.clamp(min=SHUT[x.state_dtype]).double().cumsum(2)
        eye = torch.eye(CHUNK, dtype=v.dtype, device=v.device).expand(*v.shape[:3], CHUNK)
        a, written, u, w = write(k, eye, b, leaves.get("beta"))  # of v = I, so that the tokens stay apart
        r, p = read(q * x.scale, k, b, u, w)
        o, s = (p * _at(scales, self.among[None])) @ v, written @ v
        for left, right in self.siblings:
            s = torch.cat([s, apply(_of(a, right), s[left]) + s[right]])
            a = None if a is None else torch.cat([a, compose(torch.stack([a[left], a[right]]), s[None])])

        slots = self._within_last(written, v)
        end = _of(a, self.last)
        for height, (chunk, seen, segment, seen_by_last) in enumerate(self.steps):
            slot, rows = LOG_CHUNK + height, r[chunk]
            scale = scales[chunk][..., min(slot + 1, scales.shape[-1] - 1)]  # padding may be longer than levels address
            o = o.index_add(0, chunk, scale[..., None] * (rows @ s[seen]))
            r = r if a is None else r.index_copy(0, chunk, _read_before(rows, a[seen]))
            if len(segment):
                slots[slot] = slots[slot].index_copy(0, segment, apply(_of(end, segment), s[seen_by_last]))
                if end is not None and a is not None:
                    passed = compose(torch.stack([a[seen_by_last], end[segment]]), s[None])
                    end = end.index_copy(0, segment, passed)
        total = None if a is None else a[self.roots][:, None]
        return {
            "o": o,
            "slots": torch.stack(slots, 1) if slots else v.new_zeros(x.state_shape),
            "a": total,
            "r": self._of_initial(r, scales),
        }

    def _within_last(self, written: Tensor, v: Tensor) -> list[Tensor]:
        """[N, H, K, V] of every final slot: what the last chunk's tokens wrote into it."""
        own = own_slots(self.position[self.last], self.after, LOG_CHUNK) & self.mask[self.last][..., None]
        written, v = written[self.last], v[self.last]
        slots = [(written * mask[:, None, None]) @ v for mask in own.unbind(-1)]
        return (slots + [torch.zeros_like(slots[0])] * self.slots)[: self.slots]

    def _of_initial(self, r: Tensor, scales: Tensor) -> Tensor:
        """λ R of every initial slot, [M, J0, H, C, K]."""
        count = most_slots(self.x.tokens)
        held = self.mask[..., None] & occupied(self.before, count)[self.owner][:, None]
        seen_at = level(self.position[..., None], starts(self.before, count)[self.owner][:, None])
        weights = _at(scales, seen_at.where(held, 0)) * held[:, None]
        return weights.movedim(3, 1)[..., None] * r[:, None]


def _at(scales: Tensor, levels: Tensor) -> Tensor:
    """scales [M, H, C, L] at levels [M or 1, C, D]; places without a token have some level that there is."""
    levels = levels.clamp(max=scales.shape[-1] - 1)[:, None]
    return scales.gather(-1, levels.expand(*scales.shape[:3], levels.shape[-1]))


def _of(a: Tensor | None, nodes: Tensor) -> Tensor | None:
    return None if a is None else a[nodes]


def _read_before(r: Tensor, a: Tensor) -> Tensor:
    """R A, for R [m, H, C, K]: what is read of a state before the transition."""
    return r @ a if Transition.of(a, r) == Transition.MATRIX else r * a.exp()[..., None, None]


def _transition_grad(a: Tensor, entered: Tensor, d_final: Tensor) -> Tensor:
    """∂L/∂A = Σ_j G^(j) X^(j)ᵀ, through the exponential where A is a logarithm; a [N, 1, H] or [N, 1, H, K, K]."""
    if Transition.of(a, entered) == Transition.MATRIX:
        return (d_final @ entered.mT).sum(1, keepdim=True)
    return (apply(a, entered) * d_final).sum((1, 3, 4))[:, None]
