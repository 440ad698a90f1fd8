"""Python binding of the hook library: intercepts functions of TurboMind and reports their calls."""

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
"""Maximum number of vision blocks: the library has one bit for each."""
SEGMENT_FIELDS = 6


class Kind(IntEnum):
    """The kind of an `Event`; see `hook.c`."""

    SEGMENTS = 0
    VISION_BEGINS = 1
    BLOCK_ENDS = 2
    LAYER_ENDS = 3


@dataclass(frozen=True, slots=True)
class Event:
    """One call inside TurboMind.

    Attributes:
        data: address of device memory: (count, width), int32 for segments, else of type ``dtype``.
        stream: the CUDA stream on which the memory is valid.
        index: index of the vision block or decoder layer.
        dtype: TurboMind's number of the data type.
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
    """The loaded library. It is never unloaded, because TurboMind's threads may be running its
    code."""

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
        """Why the functions of a loaded module cannot be intercepted; None if they can. Changes
        nothing."""
        return self._text(self._library.hook_check(module.encode()))

    def attach(self, module: str) -> str | None:
        """Intercept the functions of a loaded module, given its path. Returns the problem, or
        None."""
        return self._text(self._library.hook_attach(module.encode()))

    def bound(self) -> int:
        """The number of TurboMind's call slots that point to this library; 0 unless all of them
        do."""
        return int(self._library.hook_bound())

    def detach(self) -> None:
        """Restore the original functions."""
        self._library.hook_detach()

    def listen(self, tell: Callable[[Event], None], blocks: Sequence[int], layers: int) -> None:
        """Register a listener, which is called on TurboMind's threads.

        Args:
            tell: the listener; must not raise.
            blocks: vision blocks whose end is reported.
            layers: number of first decoder layers whose end is reported.
        """
        if not all(0 <= block < MOST_BLOCKS for block in blocks):
            raise ValueError(f"vision blocks {list(blocks)} are not all below {MOST_BLOCKS}")
        self._tell = tell
        mask = sum(1 << block for block in set(blocks))
        self._library.hook_listen(self._listener, mask, layers)

    def silence(self) -> None:
        """Remove the listener. Must not be called during a forward with images."""
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
        library.LibraryUnavailable: the library cannot be found, built or loaded.
    """
    path = library.find()
    try:
        return Hook(path)
    except OSError as error:
        raise library.LibraryUnavailable(f"{path} cannot be loaded: {error}") from error
