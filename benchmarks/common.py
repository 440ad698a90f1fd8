"""What every benchmark shares: a fair timing loop, the environment, JSON and Markdown.

The contenders of one comparison take turns inside the same run, so that a busy moment of the
machine hits all of them; the order alternates between rounds. Times are reported as a median
with the fastest and the slowest round, never as a single number.

Run a benchmark from the repository root, for example ``python -m benchmarks.mrope``.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS_VARIABLE = "BENCHMARK_RESULTS"
"""Environment variable with another folder for the results, for a look that is no measurement."""
RESULTS = Path(os.environ.get(RESULTS_VARIABLE) or Path(__file__).parent / "results")
PACKAGES = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow", "lmdeploy", "grpcio")


@dataclass(frozen=True)
class Sample:
    """The timed rounds of one contender, in seconds, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def max(self) -> float:
        return max(self.seconds)

    def row(self, scale: float = 1e3) -> dict[str, float]:
        """Median, min and max times ``scale`` (default: milliseconds), and the number of rounds."""
        return {
            "median": self.median * scale,
            "min": self.min * scale,
            "max": self.max * scale,
            "rounds": len(self.seconds),
        }


def compare(
    contenders: Mapping[str, Callable[[], object]], repeats: int = 7, warmup: int = 2
) -> dict[str, Sample]:
    """Time every contender ``repeats`` times, taking turns; garbage collection waits outside.

    ``warmup`` untimed rounds come first. Every second round runs in reverse order. A contender
    that takes less than about 50 microseconds should loop inside itself.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            order = list(contenders.items())
            for name, run in order if turn % 2 == 0 else reversed(order):
                gc.collect()
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def environment() -> dict[str, Any]:
    """Versions, date, processor, threads and the load of the machine at this moment."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_1_5_15_min": [round(value, 2) for value in os.getloadavg()],
    }


def write_results(name: str, rows: Sequence[Mapping[str, Any]], notes: str = "") -> Path:
    """Write ``benchmarks/results/<name>.json`` with the environment, and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"benchmark": name, "notes": notes, "environment": environment(), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the columns are the keys of all rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")
    return "\n".join(lines)


def spread(sample: Sample, scale: float = 1e3, digits: int = 2) -> str:
    """``median (min-max)`` as text, in milliseconds unless ``scale`` says otherwise."""
    low, middle, high = (value * scale for value in (sample.min, sample.median, sample.max))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
