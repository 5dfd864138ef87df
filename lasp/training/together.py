"""What all ranks do together ends alike on each of them: an error of one is an error of all."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from lasp.kernels.pending import Pending
from lasp.parallel import comm
from lasp.parallel.comm import Group

Result = TypeVar("Result")
_KINDS = (ValueError, FloatingPointError, OSError)


def together(group: Group, action: Callable[[], Result]) -> list[Result]:
    """Runs `action` on every rank; everybody's results, in rank order, once all are through.

    What one rank raises is raised on all, told with its rank: a ValueError, FloatingPointError or OSError as such, any
    other exception as a RuntimeError.
    """
    if group is None or comm.size(group) == 1:
        return [action()]
    result, failure, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        cause = error
        failure = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError), str(error) or repr(error)
    outcomes = comm.gather_objects((result, failure), group)
    for rank, (_, failed) in enumerate(outcomes):
        if failed is not None:
            kind, text = failed
            raise kind(f"rank {rank}: {text}") from cause
    return [result for result, _ in outcomes]


def on_rank_0(group: Group, action: Callable[[], object]) -> None:
    """As `together`, but only rank 0 acts."""
    together(group, lambda: action() if comm.rank(group) == 0 else None)


def any_of(group: Group, *flags: bool) -> list[bool]:
    """Of each flag, whether it is up on any rank. Collective."""
    if comm.size(group) == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=comm.message_device(group))
    return [count > 0 for count in comm.all_reduce(raised, group).wait().tolist()]


def beside(action: Callable[[], None]) -> Pending[None]:
    """Runs `action` in a thread; `wait()` raises what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    def finish() -> None:
        thread.join()
        if raised:
            raise raised[0]

    thread = threading.Thread(target=run, name="beside", daemon=True)
    thread.start()
    return Pending(finish)
