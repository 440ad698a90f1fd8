"""The section of docs/schemas.md with measurements, from the stored results of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COLUMNS = {
    "xgrammar, any whitespace": "xgrammar",
    "llguidance": "llguidance",
    "llguidance, lenient": "llguidance, lenient, with our validation",
    "ours": "this service, declared order",
    "ours, any order": "this service, any order",
}
"""Engines of `benchmarks.maskbench`, and what the page calls them."""
COUNTS = {
    "exact grammar": "exact",
    "an invalid instance that becomes an answer": "OK answers invalid",
    "served": "served",
    "`ENFORCED`": "enforced",
    "`ENFORCED`, on an engine that counts no lengths": "enforced by the grammar alone",
}
"""Lines of the table, and the columns of the benchmark."""
Result = Mapping[str, Any]


def section(maskbench: Result, large_vocabulary: Result) -> str:
    """Markdown of the measurements. The arguments: the results of the benchmarks of these names."""
    rows = {row["engine"]: row for row in maskbench["rows"]}
    engines = {name: title for name, title in COLUMNS.items() if name in rows}
    table = [
        ["schemas with", *engines.values()],
        *(
            [title, *(_count(rows[name].get(key)) for name in engines)]
            for title, key in COUNTS.items()
        ),
    ]
    versions = ", ".join(dict.fromkeys(maskbench["notes"].partition(". ")[0].split(", ")))
    text = f"Of {rows['ours']['schemas']:,} schemas, {_when(maskbench)}; {versions}:\n\n{_table(table)}"
    times = [
        [where, *(_milliseconds(row[key]) for key in ("ours: compile s", "xgrammar: compile s")),
         f"{row['ours / xgrammar']:.2g}"]
        for where, row in _sampled(large_vocabulary["rows"])
    ]  # fmt: skip
    if times:
        head = ["milliseconds", "this service", "xgrammar's own conversion", "ratio"]
        text += (
            f"\nAnalysis and compilation, processor time of one thread, {_when(large_vocabulary)}; "
            "10,000 ms is the most that is waited for:\n\n"
            f"{_table([head, *times])}"
        )
    return text


def stored() -> str:
    """The same of the stored results."""
    return section(*(_read(name) for name in ("maskbench", "large_vocabulary")))


def _read(name: str) -> Result:
    found: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _sampled(rows: Iterable[Result]) -> Iterable[tuple[str, Result]]:
    """What a row of both engines is of, and the row."""
    for row in rows:
        if "ours / xgrammar" in row:
            yield row["schema"].replace("sample of ", "").replace(" over ", " schemas over "), row


def _when(result: Result) -> str:
    found = result["environment"]
    load = found["load_average_1_5_15_min"][0]
    return f"{found['date'][:10]} on {found['cores']} cores with a load of {load:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _table(rows: list[list[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join((head, "|" + "---|" * len(rows[0]) + "\n", *others))
