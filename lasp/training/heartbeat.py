"""Where every rank is, in a file of its own: for those who look at a run that hangs, and for the errors of other ranks.

    run_dir/ranks/heartbeat-00003    JSON, written anew every PERIOD seconds; gone when the rank has ended well
    run_dir/ranks/nccl-trace-3       the flight recorder's, of a rank on a GPU whose messages ran out of time

A rank is behind that has been silent for three periods, or does something else than the one that met the error.
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lasp.training.runtime import World, ranks_folder

PERIOD = 10.0  # seconds
FRAMES = 4  # of the stack's innermost


@contextmanager
def heartbeat(run_dir: str | Path, world: World) -> Iterator[None]:
    """Inside it this rank writes its file. A RuntimeError that leaves it gets a note of the ranks that are behind."""
    folder = ranks_folder(run_dir)
    own, unfinished, ended = _file(folder, world.rank), folder / f"unfinished-{world.rank}", threading.Event()
    if world.rank == 0:
        for path in folder.glob("heartbeat-*"):
            if path >= _file(folder, world.size):
                path.unlink()

    def write() -> None:
        with suppress(OSError):
            unfinished.write_text(json.dumps(_state(world)))
            unfinished.replace(own)

    def beat() -> None:
        while not ended.wait(PERIOD):
            write()

    def end() -> None:
        ended.set()
        thread.join()

    write()
    thread = threading.Thread(target=beat, name="rank's heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError):
            for text in _behind(folder, world):
                error.add_note(text)
        raise
    else:
        end()
        own.unlink(missing_ok=True)
    finally:
        end()


def _state(world: World) -> dict[str, Any]:
    return {
        "rank": world.rank,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "time": time.time(),
        "doing": world.doing,
        "at": _stack(),
    }


def _stack() -> list[str]:
    """Where the main thread is, its innermost frames first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return [f"{f.filename}:{f.lineno} {f.name}" for f in reversed(traceback.extract_stack(frame)[-FRAMES:])]


def _behind(folder: Path, world: World) -> list[str]:
    """What is known of ranks that are silent, or that do something else than this one."""
    told = []
    for rank in range(world.size):
        with suppress(OSError, ValueError):
            state = json.loads(_file(folder, rank).read_text())
            silent = time.time() - state["time"]
            if rank != world.rank and (silent > 3 * PERIOD or state["doing"] != world.doing):
                told.append(
                    f"rank {rank} (process {state['process']} of {state['host']}) was last seen {silent:.0f} s ago, "
                    f"during {state['doing']}, at {state['at'][0]}"
                )
    return told


def _file(folder: Path, rank: int) -> Path:
    return folder / f"heartbeat-{rank:05d}"
