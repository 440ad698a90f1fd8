"""What the measurements of the servers' overhead share: servers in processes of their own, and the command."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import environment, markdown, write_results

ROOT = Path(__file__).parents[1]
QUICK_S = 0.2
"""Length of a round that only shows that the benchmark runs, in seconds."""

Servers = Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
"""Servers by name; each prints its ports when it is ready."""


@contextmanager
def started(*words: str) -> Iterator[tuple[list[int], subprocess.Popen[str]]]:
    """A module in a process of its own, with its log in a file: its ports, and the process."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            ports = [int(word) for word in process.stdout.readline().split()]
            if not ports:
                log.seek(0)
                raise RuntimeError(log.read().decode(errors="replace"))
            yield ports, process
        finally:
            process.terminate()
            process.wait(20)
            if process.stdout is not None:
                process.stdout.close()


def rounds_of(description: str, servers: Servers, *, quick_rounds: int) -> tuple[float, int] | None:
    """The length of a round in seconds and the number of rounds, from the command line. None where
    this process was one of the servers."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that it runs")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", choices=servers, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(servers[given.serve]())
        return None
    return (QUICK_S, quick_rounds) if given.quick else (given.seconds, given.rounds)


def publish(name: str, rows: Sequence[dict[str, Any]], verdict: str, notes: str) -> None:
    """Store the results and print them; the figures of single rounds are only stored."""
    write_results(name, rows, f"{verdict} {notes}")
    print(environment())
    print(markdown([{key: one for key, one in row.items() if key != "rounds"} for row in rows]))
    print(verdict)
