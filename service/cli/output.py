"""Output to terminals and files of any encoding."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

JSON_ESCAPES = "json-escapes"


def any_encoding(stream: TextIO) -> None:
    """Make a stream write characters that its encoding lacks as JSON escapes: ``\\u00e9``.

    In JSON such characters only occur inside strings, so the escaped JSON has the same value.
    """
    codecs.register_error(JSON_ESCAPES, json_escapes)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=JSON_ESCAPES)


def echo(text: str = "") -> None:
    """Print a line to stdout and flush. Unlike ``typer.echo``, keeps the encoding that the user
    set, even ASCII."""
    print(text, flush=True)


def json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Error handler: replaces unencodable characters by JSON escapes, as surrogate pairs above
    U+FFFF."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    codes = (units[index : index + 2].hex() for index in range(0, len(units), 2))
    return "".join(f"\\u{code}" for code in codes), error.end
