"""Plans as a table, as JSON, and as a picture of memory against context."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Column, Table

from lasp.pictures import empty_figure
from lasp.plan import search
from lasp.plan.gpus import GIB
from lasp.plan.search import Plan
from lasp.plan.setting import Setting, sizes


def table(made: Plan, others: Iterable[Plan]) -> RenderableType:
    """The plan's memory and time by part, and the other plans in a row each."""
    job = made.job
    memory = _parts(f"peak memory of a GPU: {made.memory.moment}", "GiB", 2, made.memory.parts, GIB)
    memory.add_row("of which there are", f"{job.gpu.usable / GIB:.2f}")
    if made.memory.host:
        memory.add_row("host, for each GPU", f"{made.memory.host / GIB:.2f}")
        memory.add_row("of which there are", f"{job.gpu.host / GIB:.2f}")
    choices = Table(title="settings: this one, and others", title_justify="left")
    for name in ("SP", "DP", "recompute", "offload", "segment", "GiB", "fits", "s a step", "tokens/s", "MFU"):
        choices.add_column(name, justify="left" if name in ("recompute", "offload", "fits") else "right", no_wrap=True)
    for each in (made, *others):
        choices.add_row(*_row(each))
    model = f"{sizes(job.model).total:,} parameters, layers {_short(job.model.layers)} ({job.model.mixer})"
    gpus = f"{job.gpus} {job.gpu.name} of {job.gpu.memory / GIB:.1f} GiB"
    return Group(
        f"{model}\n{gpus}, contexts of {job.context:,} tokens\n{search.options(made.setting)}\n",
        Columns([memory, _parts("time of a step", "s", 3, made.step, 1)]),
        choices,
    )


def _parts(title: str, unit: str, digits: int, parts: dict[str, float], scale: float) -> Table:
    """From the largest down, and their sum; what rounds to nothing is left out."""
    table = Table("part", Column(unit, justify="right"), title=title, title_justify="left")
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        if size / scale >= 0.5 * 10**-digits:
            table.add_row(name, f"{size / scale:.{digits}f}")
    table.add_section()
    table.add_row("in all", f"{sum(parts.values()) / scale:.{digits}f}")
    return table


def as_json(made: Plan, others: Iterable[Plan]) -> dict[str, Any]:
    """Bytes and seconds."""
    return {
        "job": asdict(made.job),
        "plan": _facts(made),
        "others": [_facts(each) for each in others],
        "advice": search.advice(made),
    }


def plot(made: Plan, path: str | Path) -> None:
    """Memory against the length of the context, for each way to keep activations."""
    job, base = made.job, made.setting
    whole = Setting(sequence_parallel=base.sequence_parallel)
    curves: dict[str, Setting] = {policy: replace(whole, recompute=policy) for policy in search.POLICIES}
    curves["full, offloaded"] = replace(curves["full"], offload_activations=True)
    tokens = base.segment_tokens or min(job.context, 2**17 * base.sequence_parallel)
    curves[f"full, segments of {tokens:,}"] = replace(curves["full"], segment_tokens=tokens)
    first, last = 2**14, max(2 * job.context, 2**20)
    contexts = [first * 2**i for i in range(40) if first * 2**i <= last]

    figure = empty_figure(7, 4.5)
    axes = figure.add_subplot(xlabel="tokens of a context", ylabel="GiB on each GPU", xscale="log", yscale="log")
    for name, setting in curves.items():
        sizes_there = [search.plan(replace(job, context=n), setting).memory.total / GIB for n in contexts]
        axes.plot(contexts, sizes_there, marker=".", label=name)
    axes.axhline(job.gpu.usable / GIB, color="black", linestyle="--", linewidth=1, label=f"{job.gpu.name} has")
    axes.plot([job.context], [made.memory.total / GIB], marker="o", color="black", linestyle="", label="this plan")
    axes.set_xticks(contexts[::2], [_tokens(n) for n in contexts[::2]], minor=False)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def choices(made: Plan) -> list[Plan]:
    """Every policy beside the plan's other settings, offloaded and not, and the best of all."""
    base = replace(made.setting, recompute_layers=None)
    found = [
        replace(base, recompute=policy, offload_activations=offload)
        for policy in search.POLICIES
        for offload in (False, True)
        if not (offload and policy == "none")
    ]
    plans = [search.plan(made.job, setting) for setting in found]
    unlike = [each for each in (*plans, search.best(made.job)) if each.setting != made.setting]
    return [each for i, each in enumerate(unlike) if each.setting not in [e.setting for e in unlike[:i]]]


def _row(made: Plan) -> tuple[str, ...]:
    setting, layers = made.setting, made.setting.recompute_layers
    return (
        str(setting.sequence_parallel),
        str(made.job.gpus // setting.sequence_parallel),
        setting.recompute if layers is None else f"{setting.recompute} {layers}",
        "yes" if setting.offload_activations else "",
        _segments(setting),
        f"{made.memory.total / GIB:.1f}",
        "yes" if made.surely_fits else "barely" if made.fits else "no",
        f"{made.seconds:.2f}",
        f"{made.tokens_per_second:,.0f}",
        f"{made.utilisation:.1%}",
    )


def _segments(setting: Setting) -> str:
    if setting.segment_tokens is None:
        return ""
    graphs = f", {setting.segment_graphs} once" if setting.segment_graphs > 1 else ""
    return f"{setting.segment_tokens:,}{' host' * setting.segment_offload}{graphs}"


def _facts(made: Plan) -> dict[str, Any]:
    return {
        "setting": asdict(made.setting),
        "fits": made.fits,
        "memory": {
            "peak": made.memory.total,
            "moment": made.memory.moment,
            "moments": made.memory.moments,
            "host": made.memory.host,
        },
        "step": made.step,
        "seconds": made.seconds,
        "tokens_per_second": made.tokens_per_second,
        "utilisation": made.utilisation,
    }


def _short(layers: str) -> str:
    """Its period, and how often it comes."""
    size = next(n for n in range(1, len(layers) + 1) if layers[:n] * (len(layers) // n) == layers)
    return layers if size == len(layers) else f"{layers[:size]} x {len(layers) // size}"


def _tokens(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}K"
