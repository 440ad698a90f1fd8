"""One plot of `benchmarks.maskbench`: what each engine makes of the schemas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plot import INK, SETTINGS

OUTCOME_PLOT = "maskbench.svg"
PARTS = {
    "exact": "#3fb68b",
    "rejects valid only": "#d9c02b",
    "accepts invalid": "#d9772b",
    "refused": "#8ab4d8",
    "timeout or crash": "#e06c75",
}
Row = Mapping[str, Any]


def parts(row: Row) -> dict[str, int]:
    """How many schemas there are of each kind; each schema is of one."""
    return {
        "exact": row["exact"],
        "rejects valid only": (
            row["served"] + row["rightly unsatisfiable"] - row["exact"] - row["accepts invalid"]
        ),
        "accepts invalid": row["accepts invalid"],
        "refused": row["refused"],
        "timeout or crash": row["timeouts"] + row["crashes"],
    }


def write_outcome_plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> bool:
    """Draw the shares into an SVG; the same numbers give the same file. False: there are none."""
    if "maskbench" not in results:
        return False
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = results["maskbench"]["rows"]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(8, 1.3 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            left = 0.0
            for name, count in parts(row).items():
                share = 100 * count / row["schemas"]
                axes.barh(place, share, 0.6, left, color=PARTS[name], label=name)
                if share > 1.5:
                    axes.annotate(
                        str(count), (left + share / 2, place), fontsize=7, ha="center", va="center"
                    )
                left += share
        axes.set_yticks(range(len(rows)), [row["engine"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(f"% of {rows[0]['schemas']} schemas", color=INK)
        axes.tick_params(colors=INK, which="both")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles[: len(PARTS)], labels[: len(PARTS)], loc="outside upper center",
            ncols=len(PARTS), frameon=False, labelcolor=INK,
        )  # fmt: skip
        for spine in axes.spines.values():
            spine.set_color(INK)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    return True
