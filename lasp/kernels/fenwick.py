"""How log-linear attention remembers: a Fenwick tree over positions within a document (math §4). Arithmetic only.

To the query at position t the source at position s has the level bit_length(t xor s): 0 for the token itself, l for the
2^(l-1) tokens before which bit l - 1 of t stands. So the tokens 0 … n - 1 are remembered in one state for each bit of n
that is set, a *slot*: slot j holds the 2^j tokens from `starts(n)[j]` on, which the token n sees at level j + 1. Later
tokens see them at other levels, but always all of a slot at the same one, and slots only ever merge:

    X -> A route(X) + S        what a run of tokens does to the slots before it

where A is the same for all slots, `route` moves each slot to the one that it becomes part of, and S are the slots of
the run's own tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.lasting import kept
from lasp.kernels.parked import to_device


class FenwickState(NamedTuple):
    """What log-linear attention carries on from: the state after some tokens of every sequence or document.

    slots: [N, J, H, K, V] in fp32 (fp64 for fp64 inputs); slot j is read if bit j of `tokens` is set, and zero else.
    tokens: [N] int64 on the host, how many have been seen. J >= bit_length(tokens).
    """

    slots: Tensor
    tokens: Tensor

    def select(self, rows: Tensor) -> "FenwickState":
        """That of some rows, which may be repeated."""
        return FenwickState(self.slots.index_select(0, rows.to(self.slots.device)), self.tokens[rows.cpu()])


def bit_length(x: Tensor) -> Tensor:
    """Of integers from 0 to 2^53."""
    return torch.frexp(x.double()).exponent.long()


def level(query: Tensor, source: Tensor) -> Tensor:
    """Of pairs of positions, which broadcast."""
    return bit_length(query ^ source)


def most_slots(tokens: Tensor) -> int:
    """How many slots hold any of these numbers of tokens."""
    return int(tokens.max()).bit_length() if tokens.numel() else 0


def occupied(tokens: Tensor, slots: int) -> Tensor:
    """[..., slots] booleans: which ones hold this many tokens."""
    return (tokens[..., None] >> torch.arange(slots, device=tokens.device)) % 2 == 1


def starts(tokens: Tensor, slots: int) -> Tensor:
    """[..., slots] the first position that every slot holds."""
    above = torch.arange(1, slots + 1, device=tokens.device)
    return tokens[..., None] >> above << above


def entered(tokens: Tensor) -> Tensor:
    """The slot that the next token enters, with all of the slots below: the place of the lowest bit that is 0."""
    return bit_length(~tokens & (tokens + 1)) - 1


def routes(before: Tensor, after: Tensor, slots: int) -> Tensor:
    """[N, J, J] booleans: whether slot i of `before` tokens is part of slot j of `after`. Empty slots go nowhere."""
    to = level(after[..., None], starts(before, slots)) - 1
    return _one_of(to, slots) & occupied(before, slots)[..., None]


def own_slots(positions: Tensor, after: Tensor, slots: int) -> Tensor:
    """[..., C, J] booleans: the slot of `after` tokens that a token [..., C] is part of."""
    return _one_of(level(after[..., None], positions) - 1, slots)


def _one_of(index: Tensor, count: int) -> Tensor:
    return index[..., None] == torch.arange(count, device=index.device)


def resized(slots: Tensor, count: int) -> Tensor:
    """[N, J, ...] as [N, count, ...]: without those beyond, which hold nothing, or with more of them."""
    missing = count - slots.shape[1]
    if missing <= 0:
        return slots[:, :count]
    return torch.cat([slots, slots.new_zeros(len(slots), missing, *slots.shape[2:])], 1)


def fitted(slots: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The slots [N, J, ...] of so many tokens [N] as [N, count, ...]; zero where they hold none."""
    full = _occupied(tuple(tokens.tolist()), slots.shape[1], slots.device)
    return resized(slots.where(full.view(*full.shape, *(1,) * (slots.ndim - 2)), 0), count)


@kept(64)
def _occupied(tokens: tuple[int, ...], slots: int, device: torch.device) -> Tensor:
    return to_device(occupied(torch.tensor(tokens, dtype=torch.long, device="cpu"), slots), device)


@kept(64)
def routes_on(
    before: tuple[int, ...], after: tuple[int, ...], slots: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`routes` as `moved` takes them, copied to a device once."""
    had, has = (torch.tensor(tokens, dtype=torch.long, device="cpu") for tokens in (before, after))
    return to_device(routes(had, has, slots), device).to(dtype)


def moved(slots: Tensor, route: Tensor) -> Tensor:
    """route(X) for X [N, J, ...] and routes [N, J, J]."""
    return torch.einsum("nij,ni...->nj...", route.to(slots.dtype), slots)


def moved_back(d_slots: Tensor, route: Tensor) -> Tensor:
    """The transpose of `moved`."""
    return moved(d_slots, route.mT)
