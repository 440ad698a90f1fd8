"""The hook library from Python: taking calls of TurboMind over, and being told of them."""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from lmdeploy_ext.deepstack import library

MOST_BLOCKS = 64
"""The library has one bit for each vision block."""
SEGMENT_FIELDS = 6


class Kind(IntEnum):
    """What an `Event` is about; `hook.c` says more."""

    SEGMENTS = 0
    VISION_BEGINS = 1
    BLOCK_ENDS = 2
    LAYER_ENDS = 3


@dataclass(frozen=True, slots=True)
class Event:
    """One call inside TurboMind.

    Attributes:
        data: address of device memory: (count, width) int32 for segments, else numbers of ``dtype``.
        stream: the CUDA stream in whose order the memory holds what it should.
        index: of the vision block or the decoder layer.
        dtype: TurboMind's number of a data type.
    """

    kind: Kind
    index: int
    data: int
    count: int
    width: int
    dtype: int
    stream: int


class _Event(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


_Listener = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Event))


class Hook:
    """The loaded library. It stays in the process: TurboMind's threads may be inside it."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("hook_check", "hook_attach"):
            function = getattr(self._library, name)
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_char_p
        self._library.hook_listen.argtypes = [_Listener, ctypes.c_uint64, ctypes.c_int]
        self._library.hook_listen.restype = None
        self._library.hook_detach.restype = None
        self._tell: Callable[[Event], None] | None = None
        self._listener = _Listener(self._called)
        atexit.register(self.silence)  # threads of TurboMind outlive the interpreter

    def check(self, module: str) -> str | None:
        """What keeps the calls of a loaded module from being taken over; changes nothing."""
        return self._text(self._library.hook_check(module.encode()))

    def attach(self, module: str) -> str | None:
        """Take the calls of a loaded module over, by its path; what is wrong, or None."""
        return self._text(self._library.hook_attach(module.encode()))

    def bound(self) -> int:
        """The number of TurboMind's call slots that lead here; 0 unless all of them do."""
        return int(self._library.hook_bound())

    def detach(self) -> None:
        """Give the calls back."""
        self._library.hook_detach()

    def listen(self, tell: Callable[[Event], None], blocks: Sequence[int], layers: int) -> None:
        """Have a function called on TurboMind's threads.

        Args:
            tell: must not raise.
            blocks: vision blocks whose end is told.
            layers: the end of so many first decoder layers is told.
        """
        if not all(0 <= block < MOST_BLOCKS for block in blocks):
            raise ValueError(f"vision blocks {list(blocks)} are not all below {MOST_BLOCKS}")
        self._tell = tell
        mask = sum(1 << block for block in set(blocks))
        self._library.hook_listen(self._listener, mask, layers)

    def silence(self) -> None:
        """Tell nobody. Not while a forward with images is under way."""
        self._library.hook_listen(_Listener(), 0, 0)
        self._tell = None

    def _called(self, pointer: ctypes._Pointer[_Event]) -> None:
        tell, found = self._tell, pointer.contents
        if tell is not None:
            tell(
                Event(
                    Kind(found.kind), found.index, found.data or 0, found.count, found.width,
                    found.dtype, found.stream or 0,
                )
            )  # fmt: skip

    @staticmethod
    def _text(found: bytes | None) -> str | None:
        return None if found is None else found.decode(errors="replace")


@cache
def hook() -> Hook:
    """The library of this process, loaded once.

    Raises:
        library.LibraryUnavailable: it cannot be found, built or loaded.
    """
    path = library.find()
    try:
        return Hook(path)
    except OSError as error:
        raise library.LibraryUnavailable(f"{path} cannot be loaded: {error}") from error
