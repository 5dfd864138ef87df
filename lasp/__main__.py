"""The command `lasp` (or `python -m lasp`), which needs more than the library does."""

import sys


def main() -> None:
    """Runs it, or says in a line what is not installed."""
    try:
        from lasp.cli import console
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "lasp":
            raise
        print(f"lasp: got no {error.name}, expected it: pip install 'lasp-sp[train]'", file=sys.stderr)
        sys.exit(1)
    console()


if __name__ == "__main__":
    main()
