"""Every benchmark, each in a process of its own, then the report.

``python -m benchmarks`` or ``make bench``; names of benchmarks run those alone, and the table of their
targets is printed. ``schemas`` stands for all benchmarks of schemas. ``--report`` only writes README.md and
the plot anew from the JSON files: ``python -m benchmarks schemas --report`` prints what the stored results
say of schemas. A benchmark that fails does not stop the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.collection import SCHEMAS_VARIABLE
from benchmarks.common import RESULTS, RESULTS_VARIABLE
from benchmarks.report import read_results, targets, write_report

ROOT = Path(__file__).parents[1]
BENCHMARKS = (
    "mrope",
    "preprocess",
    "encoder",
    "reference_engine",
    "server_overhead",
    "http_overhead",
    "call_metrics",
    "cold_start",
    "deepstack_hook",
    "maskbench",
    "large_vocabulary",
    "lengths",
    "schema_answers",
    "fuzzed_schemas",
    "goodput",
)
GROUPS = {"schemas": ("maskbench", "large_vocabulary", "lengths", "schema_answers", "goodput")}
"""Names that stand for several benchmarks."""
QUICK_RESULTS = ROOT / ".cache" / "benchmarks"


def run(name: str, quick: bool, results: Path, schemas: Path | None = None) -> bool:
    """Run one benchmark; its output goes where ours goes. Returns whether it succeeded.

    schemas: the collection for those that need one, in place of the usual one.
    """
    words = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, RESULTS_VARIABLE: str(results)}
    if schemas is not None:
        environment[SCHEMAS_VARIABLE] = str(schemas.resolve())
    code = subprocess.run(words, cwd=ROOT, env=environment).returncode
    outcome = "done" if code == 0 else f"FAILED with exit code {code}"
    print(f"== {name}: {outcome} after {time.monotonic() - started:.0f} s", flush=True)
    return code == 0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    known = (*BENCHMARKS, *GROUPS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(known)}")
    parser.add_argument("--report", action="store_true", help="write the report, measure nothing")
    parser.add_argument(
        "--quick", action="store_true", help="see that they run; results go to .cache/benchmarks"
    )
    parser.add_argument("--results", type=Path, help="another folder for the results")
    parser.add_argument(
        "--schemas", type=Path, metavar="FILE.jsonl", help="another collection of schemas"
    )
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    named = [one for name in arguments.names for one in GROUPS.get(name, (name,))]
    results = (arguments.results or (QUICK_RESULTS if arguments.quick else RESULTS)).resolve()
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    if not arguments.report:
        names = named or BENCHMARKS
        failed = [
            name for name in names if not run(name, arguments.quick, results, arguments.schemas)
        ]
    print(f"\nReport: {write_report(results)}")
    if named:
        print(f"\n{targets(read_results(results), named)}")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
