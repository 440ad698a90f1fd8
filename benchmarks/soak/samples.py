"""Samples of a server from outside, the trend of its memory, and the plot."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

MIB = 1 << 20
PANELS = {
    "memory, MiB": ("pss_mib", "server_rss_mib"),
    "file descriptors, threads": ("descriptors", "threads"),
    "tasks, calls in flight, slots": ("tasks", "calls", "slots", "queued"),
}
"""Title of a part of the plot -> the numbers that it shows."""

Sample = Mapping[str, float]


def look(server: psutil.Process) -> dict[str, float]:
    """Memory of the server and of its worker processes; descriptors and threads of the server.

    PSS shares the pages that several processes map among them, so that their sum is true.
    """
    pss = 0.0
    workers = server.children(recursive=True)
    for process in (server, *workers):
        try:
            pss += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # killed by the load a moment ago
            continue
    memory = server.memory_info()
    return {
        "pss_mib": pss / MIB,
        "server_rss_mib": memory.rss / MIB,
        "server_anonymous_mib": (memory.rss - memory.shared) / MIB,
        "descriptors": server.num_fds(),
        "threads": server.num_threads(),
        "workers": len(workers),
    }


def last_line(path: Path) -> dict[str, float]:
    """The newest counts that the probe in the server has written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]  # the last one may be half written
    found: dict[str, float] = json.loads(lines[-1])
    return found


def minutes(samples: Sequence[Sample], name: str, after: float) -> list[tuple[float, float]]:
    """Minute -> median of the samples of that minute, of minutes that began ``after`` or later."""
    rows: dict[int, list[float]] = {}
    for sample in samples:
        rows.setdefault(int(sample["minute"]), []).append(sample[name])
    return [(at + 0.5, statistics.median(found)) for at, found in rows.items() if at >= after]


def growth_percent(points: Sequence[tuple[float, float]], over_minutes: float) -> float | None:
    """Trend over so many minutes, in percent of its own value at the first point.

    The trend is the median of the slopes between all pairs of points (Theil and Sen), so that a
    single minute with large images does not decide. None with fewer than three points.
    """
    if len(points) < 3:
        return None
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2)]
    slope = statistics.median(slopes)
    start = statistics.median(value - slope * (at - points[0][0]) for at, value in points)
    return 100 * slope * over_minutes / start


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One line for each sample, rounded to what the plot and the trend need."""
    names = list(dict.fromkeys(name for sample in samples for name in sample if name != "time"))
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(names)
        for sample in samples:
            table.writerow([f"{sample.get(name, 0):.6g}" for name in names])


def plot(samples: Sequence[Sample], path: Path, title: str) -> None:
    """One figure with a part for each of ``PANELS``, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot

    figure, parts = pyplot.subplots(len(PANELS), 1, figsize=(9, 8), sharex=True)
    at: list[Any] = [sample["minute"] for sample in samples]
    for part, (name, keys) in zip(parts, PANELS.items(), strict=True):
        for key in keys:
            part.plot(at, [sample[key] for sample in samples], label=key, linewidth=1)
        part.set_title(name, loc="left", fontsize=9)
        part.legend(fontsize=8, loc="upper right")
        part.set_ylim(bottom=0)
        part.grid(alpha=0.3)
    parts[-1].set_xlabel("minutes")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
