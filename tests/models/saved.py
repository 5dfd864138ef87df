"""Counting what is kept between forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lasp.kernels.once import Results


class Saved:
    """The storages that autograd and `Results` keep, each once, those of a model's weights and buffers left out."""

    def __init__(self, model: nn.Module):
        self._not = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        self._bytes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # or another storage might come to lie in its place

    def add(self, kept: object) -> None:
        if isinstance(kept, tuple):
            for each in kept:
                self.add(each)
        if isinstance(kept, Tensor) and (storage := kept.untyped_storage()).data_ptr() not in self._not:
            self._bytes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(kept)

    @property
    def bytes(self) -> int:
        return sum(self._bytes.values())


@contextmanager
def counting(model: nn.Module) -> Iterator[Saved]:
    """What is saved within, before any of it is used."""
    saved, add = Saved(model), Results.add

    def keep(x: Tensor) -> Tensor:
        saved.add(x)
        return x

    def add_result(results: Results, result: object) -> None:
        saved.add(result)
        add(results, result)

    with saved_tensors_hooks(keep, lambda x: x), patch.object(Results, "add", add_result):
        yield saved
    saved._alive.clear()
