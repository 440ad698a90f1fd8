"""Strict JSON: what RFC 8259 allows and nothing more, in bounded depth.

``json.loads`` alone takes the last of duplicate keys, reads NaN and Infinity, turns 1e999 into
infinity and recurses as deep as the text says. Each of them would let a wrong answer pass as a
right one.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from service.schema_compiler.exact import UnreadableNumber, read

MAX_ANSWER_DEPTH = 200
"""Levels of nesting in an answer; far below what the parser's recursion allows."""
MAX_VALUES = 2**17
"""Maximum number of values in a text. A value of a few bytes takes up to 250 bytes of memory, and the
parser holds the GIL; this many take 30 MiB and a tenth of a second. The largest schema that the default
settings allow has fewer."""

# A string (also one that never ends, so that the scan stays linear) or a bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_EMPTY = re.compile(r"[\[{]\s*[\]}]")
# The same of a text that is JSON, with the comma between members.
_MEMBER_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]')
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonTextError(ValueError):
    """The text is not strict JSON. The message says where and why, without quoting the text."""


class JsonTooDeep(JsonTextError):
    """The text is nested deeper than allowed."""


def depth(text: str) -> int:
    """Deepest nesting of brackets outside strings; linear, without parsing."""
    level = deepest = 0
    for match in _TOKEN.finditer(text):
        bracket = match.group()
        if bracket in ("[", "{"):
            level += 1
            deepest = max(deepest, level)
        elif bracket in ("]", "}"):
            level -= 1
    return deepest


def has_too_many_values(text: str) -> bool:
    """Whether the text has more than MAX_VALUES values; linear, without parsing."""
    if _separators(text) < MAX_VALUES:
        return False
    bare = _STRING.sub('"', text)
    return _separators(bare) - len(_EMPTY.findall(bare)) >= MAX_VALUES


def _separators(text: str) -> int:
    """One less than the number of values, if no array or object is empty and no string has these
    characters."""
    return text.count(",") + text.count("[") + text.count("{")


def decode(
    text: str,
    *,
    max_depth: int = MAX_ANSWER_DEPTH,
    exact: bool = False,
    names_may_repeat: bool = False,
) -> Any:
    """One JSON value. Raises ``JsonTextError`` for anything that is not exactly one.

    exact: numbers with a point or an exponent are ``Decimal``, as in `service.schema_compiler.exact`, else
    ``float``. names_may_repeat: of members of an object with the same name the last one counts, at
    its place, as in `without_repeats`; else they are an error.
    """
    if text.startswith("\ufeff"):
        raise JsonTextError("a byte order mark (U+FEFF) stands before it; leave it out")
    if has_too_many_values(text):
        raise JsonTextError(f"more than {MAX_VALUES} values")
    # Without as many brackets no text is that deep, and to count them takes far less time.
    if text.count("{") + text.count("[") > max_depth and depth(text) > max_depth:
        raise JsonTooDeep(f"nested more than {max_depth} levels deep")
    try:
        value = _DECODERS[exact, names_may_repeat].decode(text)
    except json.JSONDecodeError as error:
        raise JsonTextError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    if "\\u" in text and _has_surrogate(value):
        raise JsonTextError("a string holds half of a surrogate pair")
    return value


def without_repeats(text: str) -> str:
    """The text without the members of objects whose name comes again in the same object, so that the
    last one counts, as in JSON parsers. Everything else stays as it is written.

    text: JSON that `decode` takes with ``names_may_repeat``. Takes linear time.
    """
    cuts: list[tuple[int, int]] = []
    # Of each open object the places where its members begin, and the last member of each name.
    open_: list[tuple[list[int], dict[str, int]] | None] = []
    is_name = False
    for match in _MEMBER_TOKEN.finditer(text):
        token = match.group()
        if token[0] == '"':
            if is_name:
                object_ = open_[-1]
                assert object_ is not None
                begins, last = object_
                name = json.loads(token) if "\\" in token else token[1:-1]
                begins.append(match.start())
                earlier = last.get(name)
                if earlier is not None:
                    cuts.append((begins[earlier], begins[earlier + 1]))
                last[name] = len(begins) - 1
            is_name = False
        elif token == ",":
            is_name = open_[-1] is not None
        elif token == "{":
            open_.append(([], {}))
            is_name = True
        elif token == "[":
            open_.append(None)
            is_name = False
        else:
            open_.pop()
            is_name = False
    return _without(text, cuts) if cuts else text


def _without(text: str, cuts: list[tuple[int, int]]) -> str:
    """The text without some parts, of which one can lie within another."""
    kept: list[str] = []
    at = 0
    for begin, end in sorted(cuts):
        if begin >= at:
            kept.append(text[at:begin])
            at = end
    kept.append(text[at:])
    return "".join(kept)


def _last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        found = {}
        for name, value in pairs:
            found.pop(name, None)  # so that the name comes where its last member is
            found[name] = value
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonTextError(f"duplicate key {short(key)}")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> Any:
    raise JsonTextError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonTextError("a number is too large")
    return value


def _exact(digits: str) -> Decimal:
    _finite(digits)
    try:
        return read(digits)
    except UnreadableNumber as error:
        raise JsonTextError(str(error)) from None


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # the interpreter bounds the digits that it converts
        raise JsonTextError("an integer has too many digits") from None


def _decoder(exact: bool, names_may_repeat: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_last if names_may_repeat else _unique,
        parse_constant=_refuse_constant,
        parse_float=_exact if exact else _finite,
        parse_int=_integer,
    )


_DECODERS = {(e, r): _decoder(e, r) for e in (False, True) for r in (False, True)}
"""By the options ``exact`` and ``names_may_repeat`` of `decode`; ``json.loads`` would make one each time."""


def _has_surrogate(value: Any) -> bool:
    """Whether a string anywhere in the value cannot be written as UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_surrogate(k) or _has_surrogate(v) for k, v in value.items())
    return isinstance(value, list) and any(_has_surrogate(item) for item in value)


def short(text: str, length: int = 60) -> str:
    """A name for a message: quoted, escaped, of bounded length."""
    cut = text if len(text) <= length else text[: length - 1] + "…"
    return json.dumps(cut)


def pointer(parts: Any) -> str:
    """JSON pointer (RFC 6901) of a path of keys and indices; the root is the empty string."""
    return "".join(["/" + str(p).replace("~", "~0").replace("/", "~1") for p in parts])
