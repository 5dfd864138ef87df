"""The keys and values that segments of a long sequence leave to later ones, each with its gradient."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lasp.kernels.parked import Parked, fetch_ahead


class KeyStore:
    """k, v [B, T, Hkv, K or V] of one softmax operation by the number of their segment, in the dtype they were computed
    in, and dk, dv, the sums of what later segments add to their gradients, in the dtype of these. Also what segments
    saw, o [B, T, H, V] and its log-sum-exp, so that who computes one again need not look at all that came before it.

    on_host: all of it waits in the host's memory. It is fetched segment by segment, the next one while the present one
    is used.
    """

    def __init__(self, on_host: bool = False):
        self.on_host = on_host
        self._keys: dict[int, tuple[Parked, ...]] = {}
        self._sums: dict[int, tuple[Parked, ...]] = {}
        self._seen: dict[int, tuple[Parked, ...]] = {}

    def __contains__(self, segment: int) -> bool:
        return segment in self._keys

    @torch.no_grad()
    def add(self, segment: int, k: Tensor, v: Tensor) -> None:
        self._keys[segment] = tuple(Parked(x, self.on_host) for x in (k, v))

    def keep_seen(self, segment: int, o: Tensor, lse: Tensor) -> None:
        self._seen[segment] = tuple(Parked(x, self.on_host) for x in (o, lse))

    def seen(self, segment: int) -> tuple[Tensor, ...]:
        """o and the log-sum-exp, or nothing; without the graph that autograd ties to what a function returns."""
        return tuple(parked.fetch().wait().detach() for parked in self._seen.get(segment, ()))

    def visit(self, segments: Iterable[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """Each segment with its k, v."""
        return fetch_ahead((segment, self._keys[segment]) for segment in segments)

    def visit_sums(self, segments: Iterable[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """Each segment with its k, v and, where something has been added to them, dk, dv."""
        return fetch_ahead((segment, self._keys[segment] + self._sums.get(segment, ())) for segment in segments)

    def store_sums(self, segment: int, sums: tuple[Tensor, ...]) -> None:
        """dk, dv, in the place of what there was."""
        if segment not in self._sums:
            self._sums[segment] = tuple(Parked(x, self.on_host) for x in sums)
        else:
            for parked, x in zip(self._sums[segment], sums, strict=True):
                parked.put(x)

    def take_sums(self, segment: int) -> tuple[Tensor, ...]:
        """dk, dv of a segment, or nothing; the store forgets all that it has of it."""
        for of_segments in (self._keys, self._seen):
            of_segments.pop(segment, None)
        return tuple(parked.fetch().wait() for parked in self._sums.pop(segment, ()))

    def forget_before(self, segment: int) -> None:
        """What no later segment will visit, and what was seen, which nobody will compute again."""
        self._seen.clear()
        self._keys = {number: keys for number, keys in self._keys.items() if number >= segment}
