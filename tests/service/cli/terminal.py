"""Runs the command line as a user does: in this process, or in one of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from service.cli.app import app

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def qwen3vl(
    *words: object, env: Mapping[str, str] | None = None, stdin: bytes | None = None
) -> Outcome:
    """Run a command in this process; any traceback fails the test."""
    clean = {name: None for name in os.environ if name.startswith("QWEN3VL_")}
    arguments = [str(word) for word in words]
    environment = {**clean, **(env or {})}
    result = CliRunner().invoke(app, arguments, input=stdin, env=environment, prog_name="qwen3vl")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


async def called(
    *words: object, env: Mapping[str, str] | None = None, stdin: bytes | None = None
) -> Outcome:
    """The same in a thread, so that a server on this event loop can answer."""
    return await asyncio.to_thread(lambda: qwen3vl(*words, env=env, stdin=stdin))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "service", *map(str, words)]


@contextmanager
def process(
    *words: object, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, killed at the end if it still runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QWEN3VL_")}
    running = subprocess.Popen(
        command(*words),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | dict(env or {}),
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def wait_for(stream: Iterator[str], text: str) -> list[str]:
    """Lines up to the first one that holds the text. Fails when the stream ends before."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} did not come: {''.join(lines)}")
