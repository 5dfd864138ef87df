"""Tensors that autograd saves, in host memory until backward comes to them."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lasp.kernels.parked import Parked
from lasp.kernels.pending import Pending


class HostMemory:
    """Saves a GPU's tensors in pinned memory of the host, for one pass forward and backward.

    They come back in reverse order: when one is asked for, the one before it starts on its way.
    """

    def __init__(self) -> None:
        self._last: Entry | None = None

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._save, self._load)

    def _save(self, x: Tensor) -> "Entry | Tensor":
        if x.numel() == 0:  # PyTorch saves one for itself
            return x
        self._last = Entry(Parked(x, on_host=True), self._last)
        return self._last

    def _load(self, entry: "Entry | Tensor") -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        x = entry.arrive()
        if entry.before is not None:
            entry.before.start()
        return x


@dataclass
class Entry:
    """A tensor that is away, the one that was saved before it, and what is on its way back."""

    parked: Parked
    before: "Entry | None" = field(repr=False)
    coming: Pending[Tensor] | None = None

    def start(self) -> Pending[Tensor]:
        if self.coming is None:
            self.coming = self.parked.fetch()
        return self.coming

    def arrive(self) -> Tensor:
        pending, self.coming = self.start(), None
        return pending.wait()
