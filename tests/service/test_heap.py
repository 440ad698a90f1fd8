"""What malloc keeps: parameters of glibc, and memory that is returned at intervals."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from service import heap
from tests.service.harness import running, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or later"
    ),
]

START = """
import ctypes
from service import heap

SIZE = 8 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]


class Info(ctypes.Structure):
    _fields_ = [(str(number), ctypes.c_size_t) for number in range(10)]


libc.mallinfo2.restype = Info


def mapped():
    return getattr(libc.mallinfo2(), "4")


"""
LOOK = (
    START
    + """
heap.limit()
libc.free(libc.malloc(SIZE))  # by default, malloc takes blocks of this size from a heap from now on
before = mapped()
block = libc.malloc(SIZE)
large = mapped() - before
small = libc.malloc(1 << 20)
print(large >= SIZE, mapped() - before > large)
"""
)


REUSE = """
import asyncio
import time


async def main():
    heap.limit()
    blocks = heap.LargeBlocks()
    libc.free(libc.malloc(SIZE))
    with blocks:
        before = mapped()
        block = libc.malloc(3 * SIZE)
        from_heap = mapped() == before
    libc.free(block)
    kept = top()
    before = mapped()
    block = libc.malloc(9 * SIZE)
    after = mapped() - before
    libc.free(block)
    blocks.give_back()
    end = time.monotonic() + 30
    while top() > SIZE and time.monotonic() < end:
        await asyncio.sleep(0.01)
    print(from_heap, kept >= 3 * SIZE, after >= 9 * SIZE, top() <= SIZE)


def top():
    return getattr(libc.mallinfo2(), "9")


asyncio.run(main())
"""


def look(environment: Mapping[str, str], code: str = LOOK) -> str:
    given = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**given, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_only_large_blocks_return_to_the_system_at_once() -> None:
    assert look({}) == "True False"


def test_what_the_operator_has_set_stays() -> None:
    assert look({"MALLOC_ARENA_MAX": "1"}) == "False False"


def test_large_blocks_are_reused_for_a_while() -> None:
    assert look({}, START + REUSE) == "True True True True"


async def test_memory_is_returned_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[None] = []
    monkeypatch.setattr(heap, "TRIM_INTERVAL_S", 0.001)
    monkeypatch.setattr(heap, "trimmer", lambda: lambda: returned.append(None))
    async with running():
        await until(lambda: len(returned) > 2, 60)
    before = len(returned)
    await asyncio.sleep(0.05)
    # A thread that had begun may end after the server.
    assert len(returned) <= before + 1, "a stopped server leaves the heap alone"


def test_the_trimmer_calls_the_system() -> None:
    trim = heap.trimmer()
    assert trim is not None
    trim()
