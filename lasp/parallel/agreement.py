"""All ranks fail together: what one refuses, every one refuses, so that nobody waits for a message that never comes."""

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from lasp.parallel import comm
from lasp.parallel.comm import Group


def agree(group: Group, device: torch.device, check: Callable[[], object]) -> None:
    """Runs `check` on every rank; raises ValueError on all of them if one raised it or if what it returned differs.

    The value returned stands for what must be equal on all ranks (shapes, dtypes, options); it is compared by its repr.
    Costs one small all-gather and a look at its result on the host.
    """
    error, value = None, ""
    try:
        value = repr(check())
    except ValueError as raised:
        error = raised
    if comm.size(group) > 1:
        mine = torch.tensor([error is not None, zlib.crc32(value.encode())], dtype=torch.int64, device=device)
        flags = comm.replicate(mine, group).tolist()
        if any(failed for failed, _ in flags):
            messages: list[str | None] = [None] * len(flags)
            dist.all_gather_object(messages, None if error is None else str(error), group=group)
            told = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
            raise ValueError("; ".join(told)) from error
        if len({checksum for _, checksum in flags}) > 1:
            values: list[str | None] = [None] * len(flags)
            dist.all_gather_object(values, value, group=group)
            told = [f"rank {rank}: {text}" for rank, text in enumerate(values)]
            raise ValueError(f"got different arguments on different ranks, expected the same: {'; '.join(told)}")
    elif error is not None:
        raise error
