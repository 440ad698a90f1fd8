"""Puts the memory of the start into pages of 2 MiB.

A call that comes after a pause, such as the wait for a model server or a GPU, finds nothing of this process
in the processor's caches. Then each page of 4 KiB that it touches costs several reads of memory until its
address is known, and in a virtual machine up to 24. In large pages, a call takes about a tenth less
processor time.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20
LARGE = 2 * MIB
MAX_BYTES = 128 * MIB
"""Maximum amount of memory that is moved into large pages: a MiB takes up to 6 ms on
a busy machine, in a thread."""
MAX_MAPPING = 256 * MIB
"""Larger mappings are weights of a model."""
FULL = 0.9
"""Least part of a large page that is in use before, so that hardly any memory is added."""
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 +(?:\[heap\])?")
_ENTRY = 8
"""Bytes for each page in Linux's ``pagemap``, whose highest bit says whether the page is in memory."""
_MADV_COLLAPSE = 25

log = logging.getLogger(__name__)


def join() -> int:
    """Move memory that is in use into large pages; call it once, when everything is loaded.

    Returns the number of bytes. 0 where the system has no such call (Linux has it since 6.1), has pages
    of other sizes, or where its operator has turned large pages off.
    """
    try:
        collapse = _collapser()
        found = [one for one in _wanted() if collapse(one)]
    except OSError as error:
        log.debug("no large pages: %s", error)
        return 0
    return len(found) * LARGE


def _wanted() -> Iterator[int]:
    """Addresses of what could be a large page, up to ``MAX_BYTES`` in all."""
    if "[never]" in (SYSTEM / "enabled").read_text() or mmap.PAGESIZE != 4096:
        return
    if int((SYSTEM / "hpage_pmd_size").read_text()) != LARGE:
        return
    pages, left = LARGE // mmap.PAGESIZE, MAX_BYTES // LARGE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for first, last in _mappings():
            for address in range(-(-first // LARGE) * LARGE, last - LARGE + 1, LARGE):
                entries = array(
                    "Q",
                    os.pread(pagemap.fileno(), pages * _ENTRY, address // mmap.PAGESIZE * _ENTRY),
                )
                if sum(entry >> 63 for entry in entries) >= FULL * pages:
                    yield address
                    left -= 1
                    if not left:
                        return


def _mappings() -> list[tuple[int, int]]:
    """Begin and end of the memory of objects: no files, no shared memory."""
    lines = map(_MAPPING.fullmatch, Path("/proc/self/maps").read_bytes().splitlines())
    found = [(int(one[1], 16), int(one[2], 16)) for one in lines if one is not None]
    return [(first, last) for first, last in found if last - first <= MAX_MAPPING]


def _collapser() -> Callable[[int], bool]:
    """A function that makes a large page of the memory at an address, if the system has one to give."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return lambda address: madvise(address, LARGE, _MADV_COLLAPSE) == 0
