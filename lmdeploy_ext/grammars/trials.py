"""Tries out grammars in a process of their own, so that none of them can stop or end the server."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import IO, Any

from lmdeploy_ext.autoload import VARIABLE
from lmdeploy_ext.grammars.worker import COSTLY, INVALID, READY, Problem
from lmdeploy_ext.switches import OFF

logger = logging.getLogger("lmdeploy_ext")

LIMIT_S = 3
"""Maximum processor time to compile a grammar, in seconds; ordinary ones take milliseconds."""
START_LIMIT_S = 120.0
BACKSTOP = 20
"""The process is killed after this many times `LIMIT_S` by the clock, on a machine without a free
processor."""
REMEMBERED = 256
"""Number of grammars whose result is kept."""
_COMMAND = (sys.executable, "-m", "lmdeploy_ext.grammars.worker")


class TrialsUnavailable(RuntimeError):
    """The process does not start."""


class _Ended(Exception):
    """The process has ended, or was killed at the time limit, before it answered."""


class Trials:
    """Tries out grammars, one after the other. Thread-safe.

    Args:
        limit_s: maximum processor time of a grammar, in whole seconds.
    """

    def __init__(self, limit_s: int = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[tuple[str, str], Problem | None] = OrderedDict()

    def problem(self, kind: str, source: str) -> Problem | None:
        """Why a grammar cannot be used; None if it can. Blocks for up to minutes.

        kind, source: see `lmdeploy_ext.grammars.worker`.

        Raises:
            TrialsUnavailable: the process does not start; the grammar was not tried out.
        """
        key = (kind, source)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            found = self._known[key] = self._tried(kind, source)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return found

    def close(self) -> None:
        """End the process. The next grammar starts another one."""
        with self._lock:
            self._end()

    def _tried(self, kind: str, source: str) -> Problem | None:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([kind, source]).encode() + b"\n")
            process.stdin.flush()
            answer = _read(process, self._limit_s * BACKSTOP)
        except (_Ended, BrokenPipeError):
            return self._died()
        return None if answer is None else (answer[0], answer[1])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        self._process = process = subprocess.Popen(
            [*_COMMAND, str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {VARIABLE: OFF[0], "OMP_NUM_THREADS": "1"},
        )
        try:
            if _read(process, START_LIMIT_S) != READY:
                raise _Ended
        except _Ended:
            self._end()
            raise TrialsUnavailable("the process that tries out grammars does not start") from None
        return process

    def _died(self) -> Problem:
        """What a grammar did to the process that compiled it."""
        status = self._end()
        logger.warning("a grammar ended the process that tried it out (%s)", status)
        if status in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
            return INVALID, "crashes the grammar compiler; nest it less deeply"
        return (
            COSTLY,
            f"takes more than {self._limit_s} seconds, or too much memory, to compile; make it "
            "smaller, nest it less deeply, and use smaller counts",
        )

    def _end(self) -> int | None:
        """Kill the process if it still runs. Returns its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return None
        status = process.poll()
        if status is None:
            process.kill()
            status = process.wait()
        for stream in (process.stdin, process.stdout):
            _close(stream)
        return status


def _read(process: subprocess.Popen[bytes], limit_s: float) -> Any:
    """The next line of the process as JSON.

    Raises:
        _Ended: the process has ended, or it was killed at the time limit.
    """
    assert process.stdout is not None
    last = time.monotonic() + limit_s
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, last - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not piece:
            if not ready:
                process.kill()
            process.wait()
            raise _Ended
        line += piece
    return json.loads(line)


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        try:
            stream.close()
        except BrokenPipeError:  # a request that the process did not read
            logger.debug("the process that tries out grammars has ended")
