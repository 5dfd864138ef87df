"""What a process has to do with the launcher that started it, which tells it by the environment; without PyTorch."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun sets it
LAUNCHER = "LASP_LAUNCHER"  # launch/elastic.py sets it: the number of its process
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # they stop a run
EXIT_CODE = 75  # that of a run that was stopped; EX_TEMPFAIL of sysexits.h: the same command goes on
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_launcher() -> None:
    """Has the kernel kill this process as soon as the launcher that started it is dead, on Linux.

    A rank that outlives its launcher would hold its run's directory, and a GPU, until it misses the others.
    """
    if ERROR_FILE in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = str(os.getppid())
        if os.environ.pop(LAUNCHER, parent) != parent:  # it died before; own children have another parent
            os.kill(os.getpid(), signal.SIGKILL)


def recorded(command: Callable[[], None]) -> Callable[[], object]:
    """The command; under torchrun, which shows the error that came first and its traceback, one that leaves it that."""
    if ERROR_FILE not in os.environ:
        return command
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(command)


def is_spokesman() -> bool:
    """Whether this process says what went wrong: every one that is alone, but rank 0 of those that torchrun watches."""
    return ERROR_FILE not in os.environ or int(os.environ.get("RANK", 0)) == 0
