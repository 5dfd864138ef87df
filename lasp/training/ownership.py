"""One run at a time trains in a directory, on ranks that all see it.

    run_dir/lock    who trains here (JSON); rank 0 touches it every few seconds, which is the run's heartbeat

A lock whose process has died is taken over: at once on the machine where that process ran, and elsewhere when the lock
has not been touched for a minute. A run whose lock is gone saves nothing any more.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lasp.parallel import comm
from lasp.parallel.comm import Group
from lasp.training.together import on_rank_0, together

LOCK_FILE = "lock"
HEARTBEAT = 5.0  # seconds between touches of the lock
STALE_AFTER = 60.0  # seconds without one after which a run on another machine counts as dead


class Lock:
    """A run's hold on its directory. Rank 0 keeps it for all."""

    def __init__(self, run_dir: str | Path, nonce: str) -> None:
        self.run_dir, self.nonce = Path(run_dir), nonce
        self.path = self.run_dir / LOCK_FILE
        self.probe = self.run_dir / f"{LOCK_FILE}-{nonce}"  # a name that no machine has looked for before

    def acquire(self) -> None:
        """Raises ValueError if another run is alive in the directory."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.probe.touch()
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        this = {"host": socket.gethostname(), "process": os.getpid(), "since": now, "nonce": self.nonce}
        while True:
            try:
                with open(self.path, "x") as file:
                    json.dump(this | _identity(os.getpid()), file)
                return
            except FileExistsError:
                owner = _read(self.path)
                self._wait_for_death(owner)
                if _read(self.path) == owner:
                    self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        return _read(self.path).get("nonce") == self.nonce

    def require_held(self) -> None:
        """Raises ValueError if another run has taken over."""
        if not self.is_held():
            raise ValueError(f"{self.path}: got {_describe(_read(self.path))}, expected this run, which saves no more")

    def release(self) -> None:
        if self.is_held():
            self.path.unlink()

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(HEARTBEAT):
                with suppress(OSError):
                    if self.is_held():
                        os.utime(self.path)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _wait_for_death(self, owner: dict[str, Any]) -> None:
        """Returns when the lock's owner is known to be dead or is gone; raises ValueError when it shows to be alive."""
        refused = (
            f"run_dir: got {str(self.run_dir)!r}, where {_describe(owner)} trains, expected a directory of no other "
            f"run; end that one first (if it is dead, remove {self.path})"
        )
        with suppress(FileNotFoundError):
            beat = self.path.stat().st_mtime
            identity = _identity(owner.get("process", 0))
            if identity["machine"] is not None and identity["machine"] == owner.get("machine"):
                if identity["started"] == owner.get("started"):
                    raise ValueError(refused)
                return
            print(f"{self.path}: held by {_describe(owner)}; waiting for a sign of life", flush=True)
            while self.path.stat().st_mtime == beat:
                os.utime(self.probe)  # both times are the file system's own: machines' clocks may differ
                if self.probe.stat().st_mtime - beat >= STALE_AFTER:
                    return
                time.sleep(HEARTBEAT / 5)
            raise ValueError(refused)


@contextmanager
def hold(run_dir: str | Path, group: Group) -> Iterator[Lock]:
    """Makes the run of this group the only one in a directory.

    Raises ValueError on every rank if another run is alive there, or if a rank does not see what rank 0 writes there.
    """
    lock = Lock(run_dir, together(group, lambda: uuid.uuid4().hex)[0])
    leads = comm.rank(group) == 0

    def require_shared() -> None:
        if not lock.probe.exists():
            raise ValueError(
                f"run_dir: got {str(run_dir)!r}, where host {socket.gethostname()} does not see what rank 0 has "
                "written, expected one directory that all ranks share"
            )
        if leads:
            lock.require_held()

    try:
        try:
            on_rank_0(group, lock.acquire)
            together(group, require_shared)
        finally:
            if leads:
                with suppress(OSError):
                    lock.probe.unlink()
        if leads:
            with lock.heartbeat():
                yield lock
        else:
            yield lock
    finally:
        if leads:
            lock.release()


def _identity(process: int) -> dict[str, Any]:
    """This boot of this machine with this space of process numbers, and when such a process began, if it is alive.

    None where the kernel does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return {"machine": None, "started": None}
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return {"machine": machine, "started": None if state in "ZX" else fields[18]}
    except OSError:
        return {"machine": machine, "started": None}


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "nobody (or an unreadable lock)"
    return f"process {owner.get('process')} of host {owner.get('host')} since {owner.get('since')}"
