"""Output to terminals and files of any encoding."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

JSON_ESCAPES = "json-escapes"


def any_encoding(stream: TextIO) -> None:
    """Write characters that the encoding of a stream lacks as JSON does: ``\\u00e9``.

    In JSON such characters only stand inside strings, so that JSON stays JSON and the same.
    """
    codecs.register_error(JSON_ESCAPES, json_escapes)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=JSON_ESCAPES)


def echo(text: str = "") -> None:
    """Print a line on stdout, now. Unlike typer's, in the encoding that the user set, ASCII or not."""
    print(text, flush=True)


def json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded by escapes of JSON, in pairs beyond U+FFFF."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    codes = (units[index : index + 2].hex() for index in range(0, len(units), 2))
    return "".join(f"\\u{code}" for code in codes), error.end
