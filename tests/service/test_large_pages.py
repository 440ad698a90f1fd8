"""Memory of the start in pages of 2 MiB."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service import large_pages
from service.large_pages import LARGE, MAX_BYTES, SYSTEM

pytestmark = pytest.mark.slow
MADV_COLLAPSE = 25


def has_large_pages() -> bool:
    """Whether this kernel moves memory into large pages when it is asked."""
    kernel = tuple(int(one) for one in re.findall(r"\d+", platform.release())[:2])
    setting = SYSTEM / "enabled"
    return (
        sys.platform == "linux"
        and kernel >= (6, 1)
        and setting.exists()
        and "[never]" not in setting.read_text()
        and int((SYSTEM / "hpage_pmd_size").read_text()) == LARGE
    )


needs_large_pages = pytest.mark.skipif(
    not has_large_pages(), reason="needs Linux 6.1, with large pages of 2 MiB not turned off"
)

PAGES = 32
"""Large pages that the system must have to give, or else a test says nothing of this service."""

SCRIPT = """
import pathlib, sys
from service import large_pages

if sys.argv[1] == "bounded":
    large_pages.MAX_BYTES = 4 * large_pages.LARGE
objects = [[str(number)] for number in range(400_000)]
rollup = pathlib.Path("/proc/self/smaps_rollup")
before = rollup.read_text()
print(large_pages.join())
print(before, rollup.read_text())
assert objects[123_456] == ["123456"]
"""


def kib(text: str, name: str) -> list[int]:
    return [int(one) for one in re.findall(rf"^ ?{name}: +(\d+) kB", text, re.MULTILINE)]


def skip_where_memory_is_fragmented() -> None:
    """The system finds no large pages at times, which is no defect."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = PAGES * LARGE
    with mmap.mmap(-1, size + LARGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1
        begin = ctypes.c_char.from_buffer(memory)
        address = -(-ctypes.addressof(begin) // LARGE) * LARGE
        given = madvise(address, size, MADV_COLLAPSE) == 0
        del begin
    if not given:
        pytest.skip("the system has no large pages to give now")


def joined(how: str) -> tuple[int, str]:
    """The bytes that were joined, and the memory of the process before and after."""
    skip_where_memory_is_fragmented()
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    ).stdout
    first, _, rest = found.partition("\n")
    return int(first), rest


@needs_large_pages
def test_objects_move_into_large_pages_and_take_no_more_memory() -> None:
    size, memory = joined("all")
    before, after = kib(memory, "AnonHugePages")
    assert size >= 8 * LARGE
    assert (after - before) * 1024 >= size // 2
    resident = kib(memory, "Rss")
    assert resident[1] < 1.15 * resident[0]


@needs_large_pages
def test_the_amount_is_bounded() -> None:
    size, _ = joined("bounded")
    assert 0 < size <= 4 * LARGE < MAX_BYTES


@pytest.mark.parametrize(
    ("setting", "size"),
    [("always madvise [never]", LARGE), ("[always] madvise never", 1 << 29)],
)
def test_an_operator_who_turned_them_off_and_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, size: int
) -> None:
    (tmp_path / "enabled").write_text(setting)
    (tmp_path / "hpage_pmd_size").write_text(str(size))
    monkeypatch.setattr(large_pages, "SYSTEM", tmp_path)
    assert large_pages.join() == 0


def test_another_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "SYSTEM", tmp_path / "nothing")
    assert large_pages.join() == 0
