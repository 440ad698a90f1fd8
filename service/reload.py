"""Reads files of the settings again when they change, and on request, without a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.settings import SettingsError

POLL_S = 1.0
"""How often files are looked at. Polling finds every kind of change on every file system, also a
symbolic link that Kubernetes points at another folder."""

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, ...] | None, ...]


def stamp(paths: Sequence[Path]) -> Stamp:
    """What changes when a file is written or replaced, or a link on the way to it; None where there is
    no file."""
    return tuple(_stamp(path) for path in paths)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(slots=True)
class _Watched:
    """stamp: of the files that were read last. failed: of the files that could not be read."""

    paths: tuple[Path, ...]
    read: Callable[[], None]
    stamp: Stamp
    failed: Stamp | None = None


class Reloader:
    """Watches files. Lives on one event loop; files are read in threads."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._asked = asyncio.Event()

    def watch(self, paths: Sequence[Path], read: Callable[[], None]) -> None:
        """Call ``read`` in a thread when a file has changed since now, and when ``now`` is called.

        read: keeps what is in use where a file cannot be used, and raises ``SettingsError``. It is
        then called again at every look, until it succeeds; the error is logged once for each change.
        """
        if paths:
            self._watched.append(_Watched(tuple(paths), read, stamp(paths)))

    def now(self) -> None:
        """Read every file again, changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Look at the files until cancelled."""
        while True:
            asked = await self._pause()
            for one in self._watched:
                await asyncio.to_thread(_look, one, asked)

    async def _pause(self) -> bool:
        """Wait for the next look. Returns whether ``now`` was called."""
        try:
            await asyncio.wait_for(self._asked.wait(), POLL_S)
        except asyncio.TimeoutError:
            return False
        self._asked.clear()
        return True


def _look(one: _Watched, asked: bool) -> None:
    found = stamp(one.paths)
    if found == one.stamp and not asked:
        return
    known = found == one.failed and not asked
    try:
        one.read()
    except Exception as error:
        # The cause may pass without another change of the file, such as a lack of descriptors.
        one.failed = found
        if known:
            return
        # Anything but a SettingsError is a defect, which must not end the watch over other files.
        defect = None if isinstance(error, SettingsError) else error
        log.error("not reloaded, what was read before stays in use: %s", error, exc_info=defect)
    else:
        one.stamp, one.failed = found, None
