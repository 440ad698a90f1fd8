"""README.md and the plot of a folder of results, from its JSON files alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from benchmarks.outcome_plot import OUTCOME_PLOT, write_outcome_plot
from benchmarks.plot import PLOT, write_plot
from benchmarks.targets import TARGETS, Row

TITLES = {
    "mrope": "Positions (mRoPE packing)",
    "preprocess": "Pre-processing of images",
    "encoder": "Vision tower",
    "reference_engine": "Reference engine",
    "server_overhead": "Overhead of the server",
    "http_overhead": "Overhead of the HTTP front end",
    "call_metrics": "Metrics of calls",
    "cold_start": "Cold start and memory",
    "deepstack_hook": "Hook of DeepStack",
    "maskbench": "Grammars from schemas",
    "lowering_features": "Features of the schema compiler",
    "large_vocabulary": "Grammars over a large vocabulary",
    "lengths": "Lengths of strings beside the grammar",
    "schema_answers": "Answers under schemas, end to end",
    "schema_answers_http": "Answers under schemas, over HTTP",
    "remote_validity": "Answers under schemas, on other model servers",
    "remote_accuracy": "Accuracy on other model servers",
    "remote_overhead": "Time added in front of another model server",
    "ray_overhead": "Replicas on Ray",
    "batch": "Batches that are killed",
    "batch_speed": "Speed of batches",
    "fuzzed_schemas": "Fuzzed and hostile schemas",
    "goodput": "Goodput, and the tax of constraints",
    "attack": "Attacks and faults",
    "soak": "Soak",
}
SHOWN_PACKAGES = ("python", "torch", "transformers", "timm", "numpy", "pillow", "grpcio")
_MET = {True: "yes", False: "**no**", None: "-"}
HEAD = """# Results

Written by `make bench`, or `python -m benchmarks --report` from the JSON files beside it. Contenders
take turns in one run; a value is the median of its rounds, in brackets the smallest and the largest.
"""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of the benchmark -> content of its JSON file, known ones first and in their order."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    names = [*(name for name in TITLES if name in found), *(n for n in found if n not in TITLES)]
    return {name: found[name] for name in names}


def write_report(folder: Path) -> Path:
    """Write README.md, and the plot where there is a peer to compare with. Returns its path."""
    results = read_results(folder)
    parts = [
        HEAD,
        f"## Targets\n\nMore than one row counts: the worst of them.\n\n{targets(results)}\n",
    ]
    if write_plot(results, folder / PLOT):
        parts.append(
            f"![How many times as fast as its peer every case is, log axis]({PLOT})\n\n"
            "Times as fast as the peer, right of the line is faster; thin lines: the slowest of ours "
            "against the fastest of theirs, and the other way round, where the rounds were kept.\n"
        )
    if write_outcome_plot(results, folder / OUTCOME_PLOT):
        parts.append(f"![What each grammar engine makes of the schemas]({OUTCOME_PLOT})\n")
    parts.append(_machine(results))
    parts += [_section(name, result) for name, result in results.items()]
    path = folder / "README.md"
    path.write_text("\n".join(parts))
    return path


def targets(results: Mapping[str, Mapping[str, Any]], names: Collection[str] | None = None) -> str:
    """The targets of some benchmarks, or of all, and what was measured, as a table."""
    rows = []
    for target in TARGETS:
        if names is not None and target.benchmark not in names:
            continue
        result = results.get(target.benchmark)
        value = None if result is None else target.measured(result["rows"])
        rows.append(
            {
                "benchmark": _linked(target.benchmark) if result else target.benchmark,
                "target": target.text,
                "wanted": target.wanted(),
                "measured": "not measured" if value is None else target.shown(value),
                "met": "-" if value is None else _MET[target.met(value)],
            }
        )
    return markdown(rows)


def _machine(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        found = result["environment"]
        versions = found["versions"]
        rows.append(
            {
                "benchmark": name,
                "date (UTC)": str(found["date"])[:16].replace("T", " "),
                "processor": found["processor"],
                "cores": found["cores"],
                "load, 1 min": found["load_average_1_5_15_min"][0],
                "widest spread": _spread(result["rows"]),
                "versions": ", ".join(
                    f"{p} {versions[p]}" for p in SHOWN_PACKAGES if p in versions
                ),
            }
        )
    return (
        "## Machine and noise\n\nThe load includes the benchmark itself. Widest spread: the largest "
        "ratio of slowest to fastest round among all contenders and cases; near 1 is a quiet "
        f"machine, and a ratio between contenders is worth no more digits than that.\n\n{markdown(rows)}\n"
    )


def _section(name: str, result: Mapping[str, Any]) -> str:
    rows = [shown(row) for row in result["rows"]]
    title = TITLES.get(name, name)
    return f"## {title}\n\n{result['notes']}\n\n{markdown(rows)}\n"


def shown(row: Row) -> dict[str, Any]:
    """A row as a table has it: samples as text, raw rounds left out."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if is_sample(value):
            if key != "values":
                cells[key] = f"{value['median']:.4g} ({value['min']:.4g}-{value['max']:.4g})"
        elif not isinstance(value, (Mapping, list)):
            cells[key] = value
    return cells


def is_sample(value: Any) -> bool:
    return isinstance(value, Mapping) and {"median", "min", "max"} <= value.keys()


def _spread(rows: Sequence[Row]) -> str:
    samples = [one for row in rows for one in _samples(row)]
    ratios = [one["max"] / one["min"] for one in samples if one["min"] > 0 and one["rounds"] > 1]
    return f"{max(ratios):.2f}×" if ratios else "-"


def _samples(value: Any) -> list[Mapping[str, float]]:
    """Every sample within a row: with its bounds, or as the list of its rounds."""
    if is_sample(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, float) for one in value):
        return [{"min": min(value), "max": max(value), "rounds": len(value)}]
    if isinstance(value, Mapping):
        return [one for inner in value.values() for one in _samples(inner)]
    return []


def _linked(name: str) -> str:
    """The name as a link to the section of its title."""
    title = TITLES.get(name, name).lower().replace(" ", "-")
    return f"[{name}](#{''.join(c for c in title if c.isalnum() or c in '-_')})"
