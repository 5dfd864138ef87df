"""A run that is told to stop (SIGTERM, SIGINT) does so between two steps, on all ranks and with a checkpoint.

The signal may come to one rank alone. A second SIGINT, at least a second after the first, ends the process at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lasp.launched import EXIT_CODE, SIGNALS
from lasp.parallel.comm import Group
from lasp.training.together import any_of

AGAIN = 1.0  # seconds after which another SIGINT is the user's, and not the launcher's copy of the first


class Stopped(SystemExit):
    """The run was told to stop, and has saved its last step. Ends a process with the exit code `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignals:
    """Whether this process was told to stop, and when first."""

    def __init__(self) -> None:
        self.since: float | None = None

    @property
    def told(self) -> bool:
        """Whether this process was."""
        return self.since is not None

    def asked(self, group: Group) -> bool:
        """Whether any rank was told to stop. Collective."""
        return any_of(group, self.told)[0]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
        elif number == signal.SIGINT and now - self.since > AGAIN:
            signal.default_int_handler(number, frame)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Inside it the signals are only taken note of, but those that this process ignores.

    Outside of the main thread, where Python handles none, they mean what they meant before.
    """
    told = StopSignals()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, told._receive)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
