"""Exact arithmetic on the numbers of JSON.

A number is the decimal that is written: ``int`` without a point and an exponent, else ``Decimal``.
Binary64 cannot hold 0.01, so a validator that divides floats finds that 0.07 is not a multiple of it.

``Decimal`` compares and hashes exactly, also with ``int``, and at any exponent. Its operators round to
28 digits and write out exponents, so nothing here uses them on numbers of unknown size.
"""

from __future__ import annotations

import json
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

Number = int | Decimal

MAX_DIGITS = 4300
"""Digits of a number, as many as the interpreter converts to ``int``."""
_CONTEXT = Context(prec=MAX_DIGITS + 400, Emax=10**17, Emin=-(10**17))
"""Its operations are exact for numbers that are read here; 400 is more than the largest exponent."""
_LEAST_EXPONENT = -(10**16)
_LOOSE = json.JSONEncoder(ensure_ascii=False)
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class UnreadableNumber(ValueError):
    """The number cannot be compared in bounded time. The message says why."""


def read(text: str) -> Decimal:
    """The number of a JSON text with a point or an exponent, which binary64 can round to a finite
    number. Raises ``UnreadableNumber``."""
    if len(text) > MAX_DIGITS:
        raise UnreadableNumber("a number has too many digits")
    mantissa, _, exponent = text.lower().partition("e")
    if not mantissa.strip("-0."):
        return Decimal(mantissa)  # any exponent says the same
    if int(exponent or 0) < _LEAST_EXPONENT:
        raise UnreadableNumber("a number is too small")
    return Decimal(text)


def text_of(value: Any, *, compact: bool = False) -> str:
    """A JSON value as text, like ``json.dumps`` without escapes, with every number exact.

    A number that a float stands for is written as the float, so 1.50 as 1.5. compact: without
    whitespace between the parts.
    """
    try:
        return (_COMPACT if compact else _LOOSE).encode(value)  # in C
    except TypeError:  # a Decimal is in it
        return _text_of(value, compact)


def _text_of(value: Any, compact: bool) -> str:
    comma, colon = (",", ":") if compact else (", ", ": ")
    if isinstance(value, Decimal):
        short = json.dumps(float(value))
        return short if Decimal(short) == value else str(value)
    if isinstance(value, list):
        return f"[{comma.join(_text_of(one, compact) for one in value)}]"
    if isinstance(value, dict):
        members = (
            f"{_LOOSE.encode(name)}{colon}{_text_of(member, compact)}"
            for name, member in value.items()
        )
        return f"{{{comma.join(members)}}}"
    return _LOOSE.encode(value)


def is_whole(value: Number) -> bool:
    """Whether a number is an integer, however it is written: 1.0 and 1e2 are."""
    return isinstance(value, int) or value == value.to_integral_value()


def is_multiple(value: Number, step: Number) -> bool:
    """Whether a number is an integral multiple of another, which is not zero."""
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    digits, exponent = parts(value)
    modulus, unit = parts(step)
    if digits == 0:
        return True
    # The last digit is not zero, so it stands at no smaller place than that of the step.
    return exponent >= unit and digits * pow(10, exponent - unit, modulus) % modulus == 0


def parts(value: Number) -> tuple[int, int]:
    """Digits and exponent of a magnitude, without zeros at the end of the digits; 0, 0 for zero."""
    _sign, digits, exponent = _CONTEXT.normalize(Decimal(value)).as_tuple()
    assert isinstance(exponent, int)
    return int("".join(map(str, digits))), exponent


def units(value: Number, places: int, *, up: bool) -> int:
    """A number in units of a decimal place, rounded up or down. places: digits after the point."""
    scaled = _CONTEXT.scaleb(Decimal(value), places)
    return int(scaled.to_integral_value(ROUND_CEILING if up else ROUND_FLOOR))
