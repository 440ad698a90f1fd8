"""Reads the inputs of a command: files, standard input (``-``), and texts of options."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable
from pathlib import Path

import typer

STDIN = "-"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def check_stdin(**given: object) -> None:
    """Refuse ``-`` in more than one place: standard input can be read once.

    given: the values of options and arguments, by parameter name of the command's function.
    """
    found: list[str] = []
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        label = {"images": "IMAGE", "file": "FILE"}.get(name, "--" + name.replace("_", "-"))
        found += [label for one in values if str(one) == STDIN]
    if len(found) > 1:
        raise typer.BadParameter(
            f"standard input can be read once, and - stands for it in {_listed(found)}"
        )


def name_of(path: Path) -> str:
    """The name of a file for a message."""
    return "standard input" if str(path) == STDIN else str(path)


def read_bytes(path: Path, flag: str) -> bytes:
    """Read the bytes of a file or of standard input; a usage error if they cannot be read."""
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except OSError as error:
        problem = error.strerror or "unknown error"
        raise typer.BadParameter(f"{name_of(path)} cannot be read ({flag}): {problem}") from None


def read_text(path: Path, flag: str) -> str:
    """Read the text of a file or of standard input, without a byte order mark.

    Accepts UTF-8, and UTF-16 with a byte order mark, which Windows PowerShell writes. A usage error
    for other bytes.
    """
    data = read_bytes(path, flag)
    encoding = "utf-16" if data.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{name_of(path)} cannot be read as UTF-8 text ({flag})") from None


def option_text(value: str, flag: str) -> str:
    """The text of an option; ``-`` reads standard input."""
    return read_text(Path(STDIN), flag) if value == STDIN else utf8(value, flag)


def utf8(value: str, flag: str) -> str:
    """The text of an option; a usage error if its bytes were not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:  # Python represents such bytes as unpaired surrogates
        raise typer.BadParameter(f"{flag} is not UTF-8 text") from None
    return value


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
