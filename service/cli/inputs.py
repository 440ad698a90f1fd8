"""What a command reads: files, standard input where ``-`` stands for a file, and texts of options."""

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

    given: values of options and arguments by their names in the function of the command.
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
    """A file in a message."""
    return "standard input" if str(path) == STDIN else str(path)


def read_bytes(path: Path, flag: str) -> bytes:
    """The bytes of a file or of standard input; a usage error where they cannot be read."""
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except OSError as error:
        problem = error.strerror or "unknown error"
        raise typer.BadParameter(f"{name_of(path)} cannot be read ({flag}): {problem}") from None


def read_text(path: Path, flag: str) -> str:
    """The text of a file or of standard input, without a byte order mark.

    UTF-8, or UTF-16 where a byte order mark says so, as Windows PowerShell writes. A usage error
    where there is no text.
    """
    data = read_bytes(path, flag)
    encoding = "utf-16" if data.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{name_of(path)} cannot be read as UTF-8 text ({flag})") from None


def option_text(value: str, flag: str) -> str:
    """The text of an option, or of standard input where the option is ``-``."""
    return read_text(Path(STDIN), flag) if value == STDIN else utf8(value, flag)


def utf8(value: str, flag: str) -> str:
    """The text of an option; a usage error where its bytes were not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:  # Python hides such bytes in half surrogate pairs
        raise typer.BadParameter(f"{flag} is not UTF-8 text") from None
    return value


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
