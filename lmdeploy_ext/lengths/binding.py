"""Python binding of the library ``lengths.c``."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmdeploy_ext.deepstack import library
from lmdeploy_ext.lengths.table import Table

SOURCE = Path(__file__).with_name("lengths.c")
_BYTES = np.ctypeslib.ndpointer(np.uint8, flags="C")
_INT32 = np.ctypeslib.ndpointer(np.int32, flags="C")
_INT64 = np.ctypeslib.ndpointer(np.int64, flags="C")


class Counters(NamedTuple):
    """What the hooks have seen in this process: matchers made, those of grammars with limits, masks
    narrowed, tokens read, tokens that broke a limit, matchers forgotten because there were too many; and
    the grammars and matchers that are known now."""

    constructed: int
    joined: int
    narrowed: int
    accepted: int
    broken: int
    evicted: int
    grammars: int
    matchers: int


class Library:
    """The loaded library. It is never unloaded, because TurboMind's threads may be running its code."""

    def __init__(self, path: Path) -> None:
        self._library = found = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for name, arguments, result in (
            ("lengths_vocabulary", [_BYTES, _INT64, ctypes.c_int32], pointer),
            ("lengths_limits", [pointer, _INT32, number], pointer),
            ("lengths_bytes", [pointer], number),
            ("lengths_examined", [pointer], ctypes.c_int32),
            ("lengths_follower", [pointer], pointer),
            ("lengths_release_vocabulary", [pointer], None),
            ("lengths_release_limits", [pointer], None),
            ("lengths_release_follower", [pointer], None),
            ("lengths_feed", [pointer, ctypes.c_char_p, number], ctypes.c_int),
            ("lengths_accept", [pointer, ctypes.c_int32], ctypes.c_int),
            ("lengths_narrow", [pointer, _INT32], None),
            ("lengths_place", [pointer, _INT32], None),
            ("hook_limit", [pointer, pointer], None),
            ("hook_forget", [], None),
            ("hook_counters", [_INT64], None),
            ("hook_check", [ctypes.c_char_p], ctypes.c_char_p),
            ("hook_attach", [ctypes.c_char_p], ctypes.c_char_p),
            ("hook_bound", [], ctypes.c_int),
            ("hook_detach", [], None),
        ):
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, result

    def vocabulary(self, tokens: Sequence[bytes]) -> Vocabulary:
        """The tokens of a model, empty for tokens that are never text."""
        return Vocabulary(self._library, tokens)

    def limit(self, grammar: int, limits: Limits | None) -> None:
        """Set the limits of TurboMind's compiled grammar whose implementation is at an address, for
        matchers that are made from now on. None removes them."""
        self._library.hook_limit(grammar, None if limits is None else limits.pointer)

    def forget(self) -> None:
        """Forget all matchers. Call it only when no engine runs."""
        self._library.hook_forget()

    def counters(self) -> Counters:
        """See `Counters`."""
        found = np.zeros(len(Counters._fields), np.int64)
        self._library.hook_counters(found)
        return Counters(*found.tolist())

    def check(self, module: str) -> str | None:
        """Why the functions of a loaded module cannot be intercepted; None if they can. Changes
        nothing."""
        return _text(self._library.hook_check(module.encode()))

    def attach(self, module: str) -> str | None:
        """Intercept the functions of a loaded module, given its path. Returns the problem, or None."""
        return _text(self._library.hook_attach(module.encode()))

    def bound(self) -> int:
        """The number of TurboMind's call slots that point to this library; 0 unless all of them do."""
        return int(self._library.hook_bound())

    def detach(self) -> None:
        """Restore the original functions."""
        self._library.hook_detach()


class Vocabulary:
    """The tokens of a model, in the library."""

    def __init__(self, library: ctypes.CDLL, tokens: Sequence[bytes]) -> None:
        data = np.frombuffer(b"".join(tokens), np.uint8)
        offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum([len(token) for token in tokens], out=offsets[1:])
        self.library = library
        self.pointer = library.lengths_vocabulary(data, offsets, len(tokens))
        weakref.finalize(self, library.lengths_release_vocabulary, self.pointer)

    def limits(self, table: Table) -> Limits:
        """The limits of a schema over this vocabulary."""
        return Limits(self, table)


class Limits:
    """The limits of a schema over a vocabulary, in the library."""

    def __init__(self, vocabulary: Vocabulary, table: Table) -> None:
        self.library = vocabulary.library
        numbers = table.numbers
        self.pointer = self.library.lengths_limits(vocabulary.pointer, numbers, len(numbers))
        weakref.finalize(self, self.library.lengths_release_limits, self.pointer)

    @property
    def size_bytes(self) -> int:
        """Approximate memory."""
        return int(self.library.lengths_bytes(self.pointer))

    @property
    def examined(self) -> int:
        """For how many nodes of texts all tokens were looked at."""
        return int(self.library.lengths_examined(self.pointer))

    def follower(self) -> NativeFollower:
        """A follower of one answer."""
        return NativeFollower(self)


class NativeFollower:
    """The follower of the library, for comparison with `lmdeploy_ext.lengths.follower`."""

    def __init__(self, limits: Limits) -> None:
        self._library = limits.library
        self.pointer = self._library.lengths_follower(limits.pointer)
        weakref.finalize(self, self._library.lengths_release_follower, self.pointer)

    def feed(self, data: bytes) -> bool:
        """See `lmdeploy_ext.lengths.follower.Follower.feed`."""
        return bool(self._library.lengths_feed(self.pointer, data, len(data)))

    def accept(self, token: int) -> bool:
        """Go on with a token."""
        return bool(self._library.lengths_accept(self.pointer, token))

    def narrow_inplace(self, words: NDArray[np.int32]) -> None:
        """See `lmdeploy_ext.lengths.vocabulary.Vocabulary.narrow_inplace`."""
        self._library.lengths_narrow(self.pointer, words)

    def place(self) -> tuple[int, ...]:
        """Mode, state of escapes, state of the next value, characters left and needed, open objects
        and arrays."""
        found = np.zeros(6, np.int32)
        self._library.lengths_place(self.pointer, found)
        return tuple(found.tolist())


@cache
def native() -> Library:
    """The library of this process, loaded once.

    Raises:
        lmdeploy_ext.deepstack.library.LibraryUnavailable: it cannot be found, built or loaded.
    """
    path = library.find(SOURCE)
    try:
        return Library(path)
    except OSError as error:
        raise library.LibraryUnavailable(f"{path} cannot be loaded: {error}") from error


def _text(found: bytes | None) -> str | None:
    return None if found is None else found.decode(errors="replace")
