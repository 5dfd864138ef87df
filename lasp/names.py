"""What users choose by name between ranks: the one list of each, for configurations, checks and the command line."""

from typing import Literal

LayoutName = Literal["contiguous", "zigzag"]
ExchangeName = Literal["auto", "all_gather", "ring", "scan", "hierarchical", "symmetric_memory"]
SoftmaxName = Literal["auto", "ring", "all_gather", "ulysses", "ulysses_ring"]
