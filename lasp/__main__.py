"""The command `lasp` (or `python -m lasp`)."""

from lasp import installed


def main() -> None:
    with installed.whole():
        from lasp.cli import console
    console()


if __name__ == "__main__":
    main()
