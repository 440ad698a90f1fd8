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
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Parameters of ``mallopt``."""

log = logging.getLogger(__name__)


def limit() -> None:
    """Set malloc's parameters for a server. Call it before threads are started.

    Parameters that the operator has set (``MALLOC_…``, ``GLIBC_TUNABLES``) stay as they are.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl and macOS
        return
    for parameter, value in (
        (_ARENA_MAX, max(2, os.cpu_count() or 1)),
        (_MMAP_THRESHOLD, MAPPED_BYTES),
        (_TRIM_THRESHOLD, TOP_BYTES),
    ):
        mallopt(parameter, value)


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
