"""Every hostile case in one run: ``make attack``, or ``python -m benchmarks.attack [NAME…]``.

Each case starts a server of its own, in a process of its own, attacks it and measures. Prints a table
and writes ``attack.json`` to the folder of the results; with names, the other cases keep the figures
of their last run. Exits with 1 when a figure misses its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.attack import connections, images, lifecycle, over_http, sharing
from benchmarks.attack.case import CASES, Case
from benchmarks.common import environment, markdown, write_results

MODULES = (connections, images, sharing, lifecycle, over_http)
"""Imported for the cases that they register."""
NOTES = (
    "`make attack`: each case against a server of its own; on the bundled model where images or the "
    "engine's time matter, else on the fake engine. Memory is resident memory of the server and its "
    "workers. The health check is asked every 20 ms by a process of its own, on the same two cores "
    "as the attacker and the server. Before: what was seen before the server was hardened."
)


def attack(one: Case, short: bool) -> list[dict[str, Any]]:
    """Run a case. Returns its rows, one for a case that broke down."""
    begun = time.monotonic()
    head = {"case": one.name, "what happens": one.does, "before": one.before}
    try:
        rows = [{**head, **value.row()} for value in one.run(short)]
    except Exception as error:  # the other cases go on, and this one counts as failed
        print(f"== {one.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        what = f"the case broke down: {type(error).__name__}"
        rows = [{**head, "what": what, "wanted": "-", "measured": "-", "met": "**no**"}]
    date = environment()["date"]
    print(f"\n== {one.name} ({time.monotonic() - begun:.0f} s): {one.does}", flush=True)
    for row in rows:
        print(
            f"   {row['what']}: {row['measured']} (wanted {row['wanted']}) {row['met']}", flush=True
        )
    return [{**row, "date": date} for row in rows]


def kept(names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run of the other cases."""
    path = common.RESULTS / "attack.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return [row for row in rows if row["case"] in CASES and row["case"] not in names]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(CASES)}")
    parser.add_argument("--short", action="store_true", help="less of each attack")
    parser.add_argument("--results", type=Path, help="another folder for the results")
    options = parser.parse_args(words)
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.results is not None:
        common.RESULTS = options.results
        options.results.mkdir(parents=True, exist_ok=True)
    names = options.names or list(CASES)
    rows = [row for name in names for row in attack(CASES[name], options.short)]
    missed = [f"{row['case']}: {row['what']}" for row in rows if row["met"] == "**no**"]
    order = list(CASES)
    everything = sorted(rows + kept(names), key=lambda row: order.index(row["case"]))
    path = write_results("attack", everything, NOTES)
    print(f"\n{markdown(everything)}\n\n{path}")
    for one in missed:
        print(f"MISSED: {one}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
