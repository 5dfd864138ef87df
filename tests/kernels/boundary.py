"""A boundary for tests, see lasp.kernels.recurrence."""

from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.kernels.recurrence import Alone, Kept
from lasp.kernels.summary import Summary


class Asked(Alone):
    """One rank that, like many, is asked for summaries before it is told what comes in."""

    wants_summary = True

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self.d_summary: Tensor | None = None

    def enter(self, summary: Summary | None, initial_state: Tensor | None) -> Pending[tuple[Tensor | None, Kept]]:
        self.summary = summary
        return super().enter(summary, initial_state)

    def enter_grad(self, kept: Kept, d_summary: Tensor | None, d_final: Tensor | None) -> Pending[Tensor | None]:
        self.d_summary = d_summary
        return super().enter_grad(kept, d_summary, d_final)
