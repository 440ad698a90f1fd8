"""One worker process that analyses grammars, seen from its parent process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from service.structured_output.wire import LENGTH, MAX_FRAME, frame

COMMAND = (sys.executable, "-m", "service.structured_output.worker")
START_LIMIT_S = 60.0
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class ChildEnded(Exception):
    """The worker process has ended, or its output is not a valid message."""


class Child:
    """A running worker process. It answers one request at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, command: Sequence[str] = COMMAND) -> Child:
        """Start a process and wait until it is ready. Raises ``ChildEnded`` or ``OSError``."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | _ONE_THREAD,
        )
        child = cls(process)
        try:
            await asyncio.wait_for(child._read(), START_LIMIT_S)
        except asyncio.TimeoutError:
            await child.end()
            raise ChildEnded("it did not start in time") from None
        except BaseException:
            await child.end()
            raise
        return child

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as its parent knows."""
        return self._process.returncode is None

    async def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Send a request and return the answer. Raises ``ChildEnded``, or ``asyncio.TimeoutError``
        at the time limit; after either error the process can no longer be used."""

        async def exchange() -> dict[str, Any]:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(frame(request))
                await self._process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                raise ChildEnded("it reads no requests") from None
            return await self._read()

        return await asyncio.wait_for(exchange(), limit_s)

    async def ended_by_itself(self, limit_s: float) -> int | None:
        """Exit status of a process that is ending, negative for a signal; None where it still runs
        after the limit."""
        try:
            return await asyncio.wait_for(self._process.wait(), limit_s)
        except asyncio.TimeoutError:
            return None

    @property
    def stopped(self) -> bool:
        """Whether a signal has stopped the process. False where the system does not tell."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as status:
                return status.read().rpartition(b") ")[2][:1] in (b"T", b"t")
        except OSError:
            return False

    async def end(self) -> int:
        """Kill the process if it still runs, and wait for its end. Returns its exit status."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                self._process.kill()
        status = await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return status

    async def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
            if length > MAX_FRAME:
                raise ChildEnded("its answer is too long")
            found = json.loads(await self._process.stdout.readexactly(length))
        except asyncio.IncompleteReadError:
            raise ChildEnded("it ended") from None
        except ValueError:
            raise ChildEnded("its answer is not JSON") from None
        if not isinstance(found, dict):
            raise ChildEnded("its answer is not an object")
        return found
