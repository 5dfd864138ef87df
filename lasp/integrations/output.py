"""A directory that is written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasp.config import require_empty


@contextmanager
def new_directory(output: str | Path) -> Iterator[Path]:
    """A directory to write to, which becomes `output` when the block ends, unless it ends by an exception.

    Raises ValueError, before the block begins, if there is a file of that name or anything in such a directory.
    """
    target = require_empty(output).resolve()
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
