"""Keeps glibc's malloc from holding memory that is no longer used.

Under a mixed load the memory in use stays the same, but the freed memory that malloc keeps grows for
hours (``heap_free_mib`` in benchmarks/results/soak.csv): 43 MiB in 25 minutes. There are two causes. Each
thread takes memory from one of up to eight heaps for each processor, and each of these heaps keeps what
its largest moment took. And once a large block was freed, malloc takes blocks of that size from these
heaps as well, where they leave gaps.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from collections.abc import Callable

MIB = 1 << 20
TRIM_INTERVAL_S = 60.0
MAPPED_BYTES = 4 * MIB
"""Blocks of this size and above, such as decoded images, come from the system and return to it. To fill
their pages with zeros takes a small part of the time that it takes to decode into them."""
TOP_BYTES = 16 * MIB
"""Free memory that the main heap may have at its end before it shrinks."""
REUSED_BYTES = 192 * MIB
"""The same while large messages arrive; a message of 64 MiB needs twice its size to be copied."""
REUSE_S = 5.0
"""How long after the last large message."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
"""Parameters of ``mallopt``."""
MAPPED_BLOCKS = 65_536
"""Maximum number of blocks that come from the system; malloc's own default."""

log = logging.getLogger(__name__)
_mallopt: Callable[[int, int], int] | None = None
"""glibc's function, which keeps the GIL; None where malloc's parameters are not ours."""


def limit() -> None:
    """Set malloc's parameters for a server. Call it before threads are started.

    Parameters that the operator has set (``MALLOC_…``, ``GLIBC_TUNABLES``) stay as they are.
    """
    global _mallopt
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        _mallopt = ctypes.PyDLL(None).mallopt
    except (AttributeError, OSError):  # musl and macOS
        return
    for parameter, value in (
        (_ARENA_MAX, max(2, os.cpu_count() or 1)),
        (_MMAP_THRESHOLD, MAPPED_BYTES),
        (_TRIM_THRESHOLD, TOP_BYTES),
    ):
        _mallopt(parameter, value)


class LargeBlocks:
    """Reuses the memory of large blocks that are freed soon, such as the copies of a large message.

    New memory from the system costs far more than to copy into it: each page interrupts the thread
    once, to be filled with zeros. A copy of 57 MB takes 52 ms with new memory and 6 ms without.
    Does nothing unless `limit` has set malloc's parameters. Not thread-safe: belongs to the main
    thread, whose heap has no limit of its size. Only for blocks that are freed soon: between blocks that
    stay, the heap would have gaps.
    """

    def __init__(self) -> None:
        self._mallopt = _mallopt
        self._end: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        """Blocks that any thread allocates during the body come from heaps, which keep their memory for
        REUSE_S. Needs a running event loop.
        """
        if self._mallopt is None:
            return
        if self._end is None:
            self._mallopt(_TRIM_THRESHOLD, REUSED_BYTES)
        else:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(REUSE_S, self.give_back)
        self._mallopt(_MMAP_MAX, 0)

    def __exit__(self, *_: object) -> None:
        if self._mallopt is not None:
            self._mallopt(_MMAP_MAX, MAPPED_BLOCKS)

    def give_back(self) -> None:
        """Return the memory to the system."""
        if self._end is None or self._mallopt is None:
            return
        self._end.cancel()
        self._end = None
        self._mallopt(_TRIM_THRESHOLD, TOP_BYTES)
        give_back = trimmer()
        if give_back is not None:
            asyncio.get_running_loop().run_in_executor(None, give_back)


def trimmer() -> Callable[[], None] | None:
    """A function that returns freed memory to the system; None if this system has none.

    The function releases the GIL and takes milliseconds; other threads that allocate may wait.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int

    def give_back() -> None:
        trim(0)

    return give_back


async def run() -> None:
    """Return freed memory at regular intervals, until cancelled."""
    give_back = trimmer()
    if give_back is None:
        log.debug("this system cannot return freed memory")
        return
    while True:
        await asyncio.sleep(TRIM_INTERVAL_S)
        await asyncio.to_thread(give_back)
