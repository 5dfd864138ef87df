"""What an evaluation found: NAME.json, a table NAME.txt and, where there is something to draw, NAME.png."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result(Protocol):
    def record(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        ...

    def table(self) -> str: ...

    def figure(self) -> "Figure | None": ...


def require_writable(folder: str | Path) -> None:
    """Raises ValueError if no file can be made in the folder, or where it would be made; leaves nothing there."""
    path = Path(folder).absolute()
    nearest = next(each for each in (path, *path.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"output: got {str(folder)!r} ({error}), expected a directory to write to") from error


def save(result: Result, folder: str | Path, name: str) -> str:
    """Writes the files, in place of earlier ones; returns the table and where they are."""
    stem = Path(folder) / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result.record(), indent=1) + "\n")
    table = result.table()
    stem.with_suffix(".txt").write_text(table + "\n")
    figure = result.figure()
    if figure is not None:
        figure.savefig(stem.with_suffix(".png"), dpi=150)
    return f"{table}\n{stem}.json, .txt" + (", .png" if figure is not None else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
