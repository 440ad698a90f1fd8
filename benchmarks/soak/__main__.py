"""A mixed load on ``qwen3vl serve`` with the bundled model, for minutes or hours.

``make soak MINUTES=30``, or ``python -m benchmarks.soak --minutes 30``. Prints a table, writes
``soak.json`` and ``soak.svg`` to the folder of the results, and exits with 1 when a call ended in a
way that its kind does not allow, when something is left behind, or when memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks import common
from benchmarks.attack.servers import free_port
from benchmarks.common import environment, markdown, write_results
from benchmarks.soak.kinds import caller
from benchmarks.soak.load import (
    Material,
    World,
    kill_workers,
    rotate_keys,
    until,
    write_keys,
)
from benchmarks.soak.samples import (
    Sample,
    growth_percent,
    last_line,
    look,
    minutes,
    plot,
    write_samples,
)
from service.client import CHANNEL_OPTIONS

ROOT = Path(__file__).parents[2]
KEY = "the key of the soak"
SEED = 15
SETTLE_MINUTES = 5.0
GROWTH_MINUTES = 30.0
MAX_GROWTH_PERCENT = 1.0
START_LIMIT_S, IDLE_LIMIT_S, STOP_LIMIT_S = 120.0, 60.0, 60.0
MEMORY = {
    "server_rss_mib": "memory of the server (RSS)",
    "server_anonymous_mib": "memory of the server that is not of files",
    "pss_mib": "memory of server and workers (PSS)",
}
JUDGED = ("server_rss_mib",)
"""PSS depends on other processes of the machine, which share the pages of torch while they run. In the
other two figures, the bounded caches that fill are a larger part."""
COUNTS = (
    "descriptors", "threads", "workers", "tasks", "calls", "slots", "queued", "metric_lines",
)  # fmt: skip
SPARE_TASKS = 4
"""Tasks of the server that come and go by themselves, such as those of health watchers."""


@dataclass(frozen=True)
class Running:
    """A server: its process, its ports, and the files that it reads and writes."""

    process: psutil.Popen
    port: int
    http_port: int
    admin_port: int
    folder: Path

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def probe(self) -> Path:
        return self.folder / "probe"

    def metric_lines(self) -> int:
        """Lines of the metrics page: labels that grow with callers would show."""
        url = f"http://127.0.0.1:{self.admin_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as page:
            return len(page.read().splitlines())


@contextmanager
def serving(folder: Path, extra: Sequence[str]) -> Iterator[Running]:
    """The command in a process of its own; it serves."""
    probe, log = folder / "probe", folder / "log"
    write_keys(folder / "keys", {"soak": KEY})
    ports = [free_port() for _ in range(3)]
    arguments = [
        *("--port", str(ports[0]), "--http-port", str(ports[1]), "--admin-port", str(ports[2])),
        *("--api-keys-file", str(folder / "keys"), "--max-concurrent", "16", *extra),
    ]
    with (
        log.open("w") as stderr,
        psutil.Popen(
            [sys.executable, "-m", "benchmarks.soak.server", str(probe), *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        ) as process,
    ):
        try:
            end = time.monotonic() + START_LIMIT_S
            while not (probe.exists() and probe.read_text().endswith("\n")):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"The server did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield Running(process, *ports, folder)
        finally:
            if process.poll() is None:
                process.kill()


async def run(
    server: Running, options: argparse.Namespace
) -> tuple[World, list[Sample], list[str]]:
    """Load the server for the time that was asked for. Returns what was seen, and the problems."""
    process, probe = server.process, server.probe
    address = f"127.0.0.1:{server.port}"
    begun = time.time()
    stop = asyncio.Event()
    samples: list[Sample] = []
    problems: list[str] = []
    before = last_line(probe)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        material, rng = Material.make(SEED), random.Random(SEED)
        world = World(
            address, server.http_port, KEY, server.keys, process, material, rng, channel
        )  # fmt: skip
        load = [
            asyncio.create_task(caller(world, stop, options.pause_s))
            for _ in range(options.callers)
        ]
        load.append(asyncio.create_task(kill_workers(world, stop, options.kill_every_s)))
        load.append(asyncio.create_task(rotate_keys(world, stop, options.rotate_every_s)))
        while (passed := time.time() - begun) < options.minutes * 60:
            if process.poll() is not None:
                problems.append(f"the server ended with exit code {process.returncode}")
                break
            seen = {**await asyncio.to_thread(look, process), **last_line(probe)}
            seen["metric_lines"] = await asyncio.to_thread(server.metric_lines)
            samples.append({**seen, "minute": passed / 60})
            await asyncio.sleep(options.sample_s)
        stop.set()
        for one in await asyncio.gather(*load, return_exceptions=True):
            if isinstance(one, BaseException):
                problems.append(f"a caller ended with {one!r}")
    if process.poll() is None:
        problems += await left_behind(probe, before)
    return world, samples, problems


async def left_behind(probe: Path, before: Sample) -> list[str]:
    """What the server still holds when nobody calls any more."""

    def idle() -> bool:
        found = last_line(probe)
        held = [found[name] for name in ("calls", "slots", "queued", "encoded_bytes")]
        return not any(held) and found["tasks"] <= before["tasks"] + SPARE_TASKS

    if await until(idle, IDLE_LIMIT_S):
        return []
    return [f"held after the last call: {last_line(probe)}; at the start: {before}"]


def stop_server(process: psutil.Popen) -> list[str]:
    """End the server as a supervisor does; it must end in order."""
    if process.poll() is not None:
        return []
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_LIMIT_S)
    except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
        return [f"the server did not end within {STOP_LIMIT_S:g} s of SIGTERM"]
    return [f"the server ended with exit code {code}"] if code else []


def tracebacks(log: Path) -> list[str]:
    """The log must have no stack trace: nothing that callers do is a surprise."""
    count = log.read_text(errors="replace").count("Traceback (most recent call last)")
    return [f"{count} stack traces in the log of the server"] if count else []


def summary(samples: Sequence[Sample], settle: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the table, and what of them is a problem."""
    problems = []
    rows: list[dict[str, Any]] = []
    for name, what in MEMORY.items():
        growth = growth_percent(minutes(samples, name, settle), GROWTH_MINUTES)
        if name in JUDGED and growth is not None and growth > MAX_GROWTH_PERCENT:
            problems.append(f"{what} grows by {growth:.2f} % in {GROWTH_MINUTES:g} minutes")
        shown = "too short to tell" if growth is None else round(growth, 2)
        rows.append({"what": f"{what}: growth in {GROWTH_MINUTES:g} minutes, %", "value": shown})
    for name in (*MEMORY, *COUNTS):
        settled = [one[name] for one in samples if one["minute"] >= settle] or [0.0]
        rows.append(
            {
                "what": name,
                "first sample": round(samples[0][name]),
                "smallest after settling": round(min(settled)),
                "largest after settling": round(max(settled)),
                "last sample": round(samples[-1][name]),
            }
        )
    return rows, problems


def outcome_rows(world: World) -> list[dict[str, Any]]:
    """How the calls of every kind ended."""
    rows = []
    for name, ends in sorted(world.counts.items()):
        counted = ", ".join(f"{end} {count}" for end, count in ends.most_common())
        rows.append({"what": f"calls: {name.replace('_', ' ')}", "value": counted})
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=8, help="at the same time")
    parser.add_argument("--pause-s", type=float, default=0.2, help="between calls of one caller")
    parser.add_argument("--sample-s", type=float, default=5.0, help="between two samples")
    parser.add_argument("--kill-every-s", type=float, default=20.0, help="a grammar worker")
    parser.add_argument("--rotate-every-s", type=float, default=15.0, help="an API key")
    parser.add_argument("--results", type=Path, help="another folder for the results")
    parser.add_argument("--note", default="", help="one sentence for the record")
    options, extra = parser.parse_known_args(words)
    if options.results is not None:
        common.RESULTS = options.results
        options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with serving(Path(folder), extra) as server:
            world, samples, problems = asyncio.run(run(server, options))
            problems += stop_server(server.process)
        problems += tracebacks(Path(folder) / "log")
    rows, grown = summary(samples, SETTLE_MINUTES)
    failures = collections.Counter(world.failures)
    problems += grown + [f"{count} × {text}" for text, count in failures.most_common()]
    calls = sum(ends.total() for ends in world.counts.values())
    rows = [
        {"what": "problems", "value": "; ".join(problems) or "none"},
        {"what": "minutes", "value": round(options.minutes, 1)},
        {"what": "calls", "value": calls},
        *rows,
        *outcome_rows(world),
    ]
    notes = (
        "`make soak`: `qwen3vl serve` on the bundled model under a mixed load with callers who "
        "cancel, do not read, send wrong images and requests and hostile bytes, over gRPC, HTTP and "
        "Connect, while grammar workers are killed and keys replaced. Growth of memory: the median of every "
        f"minute from minute {SETTLE_MINUTES:g} on, the median of the slopes between all pairs of "
        f"these (Theil–Sen), times {GROWTH_MINUTES:g} minutes, in percent of the trend's value at "
        f"minute {SETTLE_MINUTES:g}. {options.note}\n\n![Samples](soak.svg)"
    )
    path = write_results("soak", rows, notes)
    write_samples(samples, path.with_suffix(".csv"))
    plot(samples, path.with_suffix(".svg"), f"{options.minutes:g} minutes, {calls} calls")
    print(environment())
    print(markdown(rows))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
