"""Makes a Markdown table and a figure of what benchmarks/scaling.py wrote.

    python benchmarks/scaling_report.py --output runs/scaling

Efficiency compares the time of a point with what it would take at the speed of a rank where there is the fewest of them
that had room (one, as a rule), without any exchange of states: t(1) / t(W) for weak scaling, t(1) / (W t(W)) for strong
scaling, but for softmax attention, whose work per token grows with the sequence. Of a hybrid model's step, the part of
its softmax layers grows so, and the rest with the tokens. Not hidden is what a call takes above the same op on the same
local tokens, of a model above the time at that speed (so that it holds all communication, and what else is slower);
predicted the same without exchanges and the simulator's time for all of these, as if none were hidden.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from scaling import ALONE, Point, read

COLUMNS = (
    "scaling",
    "case",
    "exchange",
    "ranks",
    "tokens a rank",
    "ms",
    "tokens/s",
    "efficiency",
    "not hidden, ms",
    "predicted, ms",
    "peak GiB",
    "softmax layers",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    output: Path = Path("runs/scaling")


@dataclass(frozen=True)
class Scaling:
    """The points, and what follows from several of them; None where one of those is missing."""

    points: list[Point]

    def base(self, point: Point) -> Point | None:
        """What efficiency is measured against."""
        own = [p for p in self.points if (p.mode, p.case) == (point.mode, point.case) and p.seconds is not None]
        alone = [p for p in own if p.exchange == ALONE] or own
        return min(alone, key=lambda p: p.ranks, default=None)

    def ideal(self, point: Point) -> float | None:
        """Seconds at the base's speed."""
        base = self.base(point)
        if base is None or base.seconds is None:
            return None
        if base.softmax_share is None:
            return base.seconds * point.work / base.work
        tokens = point.tokens / base.tokens
        keys = tokens * point.ranks / base.ranks
        return base.seconds * tokens * (1 - base.softmax_share + base.softmax_share * keys)

    def without(self, point: Point) -> float | None:
        """Seconds of the same work if nothing were exchanged."""
        alone = [p.seconds for p in self.points if p.key == (point.mode, point.case, ALONE, point.ranks, point.tokens)]
        return alone[0] if alone else self.ideal(point)

    def row(self, point: Point) -> list[str]:
        seconds, ideal, without = point.seconds, self.ideal(point), self.without(point)
        predicted, compared = point.predicted_exchange, point is not self.base(point) and point.exchange != ALONE
        extra = seconds - without if compared and seconds is not None and without is not None else None
        return [
            point.mode,
            point.case,
            point.exchange,
            str(point.ranks),
            f"{point.tokens:,}",
            point.note or cell(seconds, ".3f", 1e3),
            cell(None if seconds is None else rate(point)[1], ",.0f"),
            cell(None if seconds is None or ideal is None else ideal / seconds, ".3f"),
            cell(extra, ".3f", 1e3),
            cell(None if without is None or predicted is None else without + predicted, ".3f", 1e3),
            cell(point.peak_bytes, ".2f", 2**-30),
            cell(point.softmax_share, ".1%"),
        ]


def cell(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else format(factor * value, form)


def table(scaling: Scaling) -> str:
    order = sorted(scaling.points, key=lambda p: (p.mode == "strong", p.case.startswith("model"), p.case, p.ranks))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(scaling.row(point) for point in order)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rate(point: Point) -> tuple[int, float]:
    """Ranks, and tokens a second of all of them."""
    return point.ranks, point.tokens * point.ranks / (point.seconds or math.nan)


def draw(scaling: Scaling, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode in ("weak", "strong") if any(p.mode == mode for p in scaling.points)]
    figure, axes = plt.subplots(1, len(modes), figsize=(6 * len(modes), 5.5), squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=True):
        timed = [p for p in scaling.points if p.mode == mode and p.seconds is not None]
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for point in timed:
            if point.exchange != ALONE:
                curves.setdefault((point.case, point.exchange), []).append(rate(point))
        ax.set_prop_cycle(color=plt.get_cmap("tab20")(range(20)))
        for (case, exchange), places in sorted(curves.items()):
            start = [rate(p) for p in timed if (p.case, p.exchange, p.ranks) == (case, ALONE, 1)]  # exchanges nothing
            ax.plot(*zip(*sorted(start + places), strict=True), marker="o", markersize=3, label=f"{case}, {exchange}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda ranks, _: f"{ranks:g}")
        ax.set(yscale="log", xlabel="ranks", ylabel="tokens/s", title=f"{mode} scaling")
        ax.grid(alpha=0.3)
        if curves:
            ax.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))  # below, off the curves
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(settings: Settings) -> None:
    file = settings.output / "points.csv"
    scaling = Scaling(read(file))
    if not scaling.points:
        sys.exit(f"{file} has no points: nothing was measured")
    (settings.output / "scaling.md").write_text(table(scaling))
    print(table(scaling))
    if all(point.seconds is None for point in scaling.points):
        sys.exit(f"no point of {file} has a time: no figure")
    try:
        draw(scaling, settings.output / "scaling.png")
    except ImportError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
