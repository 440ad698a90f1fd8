"""Calls in forks of a process that has imported LMDeploy; see `tests.host_runtime.warm`."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OF_A_CALL = frozenset(
    f"HOST_RUNTIME_{name}"
    for name in ("MODE", "TRACE", "MASKS", "POISON", "DELAY_US", "NULL_TOKEN", "CAPABILITY")
) | {"SCRIPTED_LOG"}
"""Variables that nothing reads before an engine starts: a fork may have its own."""
KEPT = 2
"""Processes that wait for calls: one with a device, one without. Each has some 700 MB."""
START_LIMIT_S = 180
PATIENCE_S = ((signal.SIGABRT, 5.0), (signal.SIGKILL, 10.0))
"""How a call is ended that takes too long: first so that it writes its stacks, then for good."""


class Lost(Exception):
    """The process that forks does not answer; the text has its output."""


class Warm:
    """One process that forks, and the socket on which it is asked."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.calls = 0
        self._folder = tempfile.TemporaryDirectory(prefix="host-runtime-")
        self._socket = str(Path(self._folder.name) / "socket")
        self._log = Path(self._folder.name) / "log"
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.host_runtime.warm"]
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(
                [*command, self._socket], env=dict(environment), cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                raise Lost(self._log.read_text(errors="replace"))

    def make(
        self, call: Mapping[str, Any], environment: Mapping[str, str], result: Path, log: Path,
        timeout_s: float,
    ) -> int | None:  # fmt: skip
        """Make a call in a fork; its exit status, None when it was ended for taking too long."""
        log.touch()
        request = {
            "call": call,
            "environment": dict(environment),
            "result": str(result),
            "log": str(log),
        }
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._socket)
            connection.sendall(json.dumps(request, default=str).encode() + b"\n")
            worker = int(self._line(connection, START_LIMIT_S))
            try:
                return int(self._line(connection, timeout_s))
            except TimeoutError:
                pass
            for number, patience_s in PATIENCE_S:
                os.killpg(worker, number)
                try:
                    self._line(connection, patience_s)
                    break
                except TimeoutError:
                    continue
            return None

    def _line(self, connection: socket.socket, timeout_s: float) -> bytes:
        end, text = time.monotonic() + timeout_s, b""
        while not text.endswith(b"\n"):
            connection.settimeout(max(end - time.monotonic(), 0.001))
            if not (piece := connection.recv(64)):
                raise Lost(self._log.read_text(errors="replace"))
            text += piece
        return text

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        self._folder.cleanup()


_warm: dict[frozenset[tuple[str, str]], Warm] = {}
_lock = threading.Lock()


@contextmanager
def warm(environment: Mapping[str, str]) -> Iterator[Warm]:
    """The process that forks for an environment. It is kept for the next call, until others are
    needed more."""
    key = frozenset(item for item in environment.items() if item[0] not in OF_A_CALL)
    with _lock:
        if key not in _warm:
            _close(keep=KEPT - 1)
            _warm[key] = Warm(environment)
        found = _warm[key]
        found.calls += 1
    try:
        yield found
    finally:
        with _lock:
            found.calls -= 1


def _close(keep: int = 0) -> None:
    """End the oldest that make no call, all but so many."""
    for key, one in list(_warm.items())[: len(_warm) - keep]:
        if not one.calls:
            del _warm[key]
            one.close()


atexit.register(_close)
