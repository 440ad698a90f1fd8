"""One plot of every comparison: how many times as fast as its peer each case is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLOT = "ratios.svg"
INK = "#808080"  # readable on white and on dark pages
COLOURS = {
    "mrope": "#4c9be8",
    "preprocess": "#3fb68b",
    "encoder": "#d99a2b",
    "reference_engine": "#c678dd",
    "server_overhead": "#e06c75",
}
SETTINGS = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One point: ratio to the peer, and the range that the rounds allow."""

    benchmark: str
    label: str
    ratio: float
    low: float
    high: float


def _mrope(rows: Sequence[Row]) -> list[Case]:
    return [_case("mrope", f"{r['tokens']} tokens, images: {r['images']}", r) for r in rows]


def _preprocess(rows: Sequence[Row]) -> list[Case]:
    return [_case("preprocess", str(row["case"]), row) for row in rows]


def _encoder(rows: Sequence[Row]) -> list[Case]:
    return [_case("encoder", f"{row['images']}, {row['dtype']}", row) for row in rows]


def _reference_engine(rows: Sequence[Row]) -> list[Case]:
    return [
        Case("reference_engine", f"{row['model']}, {row['dtype']}, {row['requests']} at once",
             *[float(row["times_transformers"])] * 3)
        for row in rows
        if row["engine"] == "ours"
    ]  # fmt: skip


def _server_overhead(rows: Sequence[Row]) -> list[Case]:
    """Text alone: an echo decodes no image."""
    found = []
    for row in rows:
        if row["case"] == "text":
            echo, ours = (row["rounds"][name]["calls_per_s"] for name in ("echo", "ours"))
            label = f"text, callers: {row['callers']}, calls/s"
            ratio = float(row["ours / echo"])
            low, high = min(ours) / max(echo), max(ours) / min(echo)
            found.append(Case("server_overhead", label, ratio, low, high))
    return found


CASES: dict[str, Callable[[Sequence[Row]], list[Case]]] = {
    "mrope": _mrope,
    "preprocess": _preprocess,
    "encoder": _encoder,
    "reference_engine": _reference_engine,
    "server_overhead": _server_overhead,
}


def _case(benchmark: str, label: str, row: Row) -> Case:
    theirs, ours = row["seconds"]["transformers"], row["seconds"]["ours"]
    return Case(
        benchmark,
        label,
        float(row["times faster"]),
        theirs["min"] / ours["max"],
        theirs["max"] / ours["min"],
    )


def cases(results: Mapping[str, Mapping[str, Any]]) -> list[Case]:
    """All comparisons of a folder of results, in its order."""
    return [
        case
        for name, result in results.items()
        if name in CASES
        for case in CASES[name](result["rows"])
    ]


def write_plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Draw every comparison into an SVG; the same numbers give the same file. False: none."""
    points = cases(results)
    if not points:
        return False
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 1 + 0.28 * len(points)), layout="constrained")
        axes = figure.subplots()
        for place, point in enumerate(points):
            colour = COLOURS.get(point.benchmark, INK)
            axes.plot([point.low, point.high], [place, place], color=colour, linewidth=1.2)
            axes.plot([point.ratio], [place], "o", color=colour, markersize=6)
            axes.annotate(
                f"{point.ratio:.3g}×", (point.ratio, place), (0, 5), color=INK, fontsize=7,
                textcoords="offset points", ha="center",
            )  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(points)), [f"{p.benchmark}: {p.label}" for p in points])
        axes.set_ylim(len(points) - 0.4, -0.8)
        axes.set_xlabel("times as fast as the peer, in the same run", color=INK)
        axes.grid(axis="x", color=INK, alpha=0.25)
        axes.tick_params(colors=INK, which="both")
        for spine in axes.spines.values():
            spine.set_color(INK)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return True
