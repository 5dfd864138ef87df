"""Takes for every size of message the exchange that costs least (lasp.parallel.cost)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from lasp.kernels.pending import Pending
from lasp.parallel.combine import Affine, Algebra
from lasp.parallel.cost import Costs, Message, choose


class Auto:
    """exchanges: those to choose from, by name; the first of equals is taken. node: how many ranks share a machine. All
    ranks must hold the same costs."""

    affine_only = False

    def __init__(self, exchanges: Mapping[str, Any], costs: Costs, ranks: int, node: int):
        self.exchanges, names = exchanges, tuple(exchanges)
        self.fastest = cache(lambda message: choose(costs, message, ranks, node, names))

    def forward(
        self, states: Tensor, transitions: Tensor | None, algebra: Algebra
    ) -> Pending[tuple[Tensor, Tensor | None]]:
        return self.chosen(states, transitions, algebra).forward(states, transitions, algebra)

    def backward(self, d: Tensor, transitions: Tensor | None, algebra: Algebra) -> Pending[Tensor]:
        return self.chosen(d, transitions, algebra).backward(d, transitions, algebra)

    def chosen(self, states: Tensor, transitions: Tensor | None, algebra: Algebra) -> Any:
        """The same in backward as in forward: it depends on the sizes of one unit's state and transition alone."""
        if not isinstance(algebra, Affine):
            return self.exchanges["all_gather"]
        units = states.shape[0]
        transition = 0 if transitions is None else transitions[0].nbytes
        return self.exchanges[self.fastest(Message(states.nbytes, units * transition, ways=units))]
