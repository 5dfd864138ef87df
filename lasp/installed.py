"""The command `lasp` needs more than the library does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def whole() -> Iterator[None]:
    """Inside it what is imported and not installed is said in a line, and ends the process."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "lasp":
            raise
        print(f"lasp: got no {error.name}, expected it: pip install 'lasp-sp[train]'", file=sys.stderr)
        sys.exit(1)
