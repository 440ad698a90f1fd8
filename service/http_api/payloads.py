"""The base64 of images, taken out of a body before it is read as JSON.

A parser of JSON would walk through megabytes of base64 several times, and hold the interpreter
meanwhile. What is left is small.
"""

from __future__ import annotations

import secrets

MARK = b";base64,"
LEAST_BYTES = 4096
"""Shorter base64 stays in the body."""
HEAD_BYTES = 128
"""How far before the mark the string may begin."""
NAME = secrets.token_hex(16)
"""Stands for base64 in a body, with a number behind it. Nobody outside of this process knows it."""


class Payloads:
    """The base64 texts that were taken out of a ``body``. ``lean``: the body without them.

    keep: leave everything in the body.
    """

    def __init__(self, body: bytes, *, keep: bool = False) -> None:
        self.body = body
        self.lean = body
        self._found: list[memoryview] = []
        self._used: set[int] = set()
        if not keep:
            self._take(body)

    def _take(self, body: bytes) -> None:
        whole = memoryview(body)
        pieces: list[bytes | memoryview] = []
        done = begin = 0
        while (mark := body.find(MARK, begin)) >= 0:
            begin = mark + len(MARK)
            end = body.find(b'"', begin)
            if end < 0:
                break
            if (
                end - begin >= LEAST_BYTES
                and _is_data_url(body, mark)
                and body.find(b"\\", begin, end) < 0
            ):
                pieces += [whole[done:begin], f"{NAME}{len(self._found)}".encode()]
                self._found.append(whole[begin:end])
                done = end
            begin = end
        if self._found:
            self.lean = b"".join([*pieces, whole[done:]])

    @property
    def all_used(self) -> bool:
        """Whether every text was asked for, so that none stood anywhere but in an image."""
        return len(self._used) == len(self._found)

    def get(self, text: str) -> memoryview | None:
        """The base64 that a text of the lean body stands for; None where it stands for itself."""
        number = text.removeprefix(NAME)
        if number == text or not number.isdecimal():
            return None
        self._used.add(int(number))
        return self._found[int(number)]


def _is_data_url(body: bytes, mark: int) -> bool:
    """Whether the mark belongs to a string that begins with ``data:``."""
    quote = body.rfind(b'"', max(0, mark - HEAD_BYTES), mark)
    escaped = quote > 0 and body[quote - 1] == ord("\\")
    return quote > 0 and not escaped and body[quote + 1 : quote + 6].lower() == b"data:"
