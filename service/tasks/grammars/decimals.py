"""Numbers with and without a fraction, between bounds and more, as expressions.

Bounds are compared with digits. That is sound where numbers are rounded on reading, since rounding
is monotone and keeps the bounds, which are binary64 numbers themselves; an open bound becomes the
next one inside. Where rounding could make two numbers one (excluded values, multiples, no integers),
numbers have at most 15 digits, which binary64 tells apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

from service.tasks.grammars.counted import TooLarge, signed_expression, texts_expression
from service.tasks.grammars.ebnf import Rules, one_of
from service.tasks.grammars.literals import Literal
from service.tasks.grammars.magnitudes import Cut, Magnitudes
from service.tasks.grammars.multiples import multiples
from service.tasks.grammars.number_conditions import (
    EXACT_DIGITS,
    INEXACT,
    TOO_LARGE,
    Bound,
    Conditions,
    Number,
    Unwritable,
)

_PLACES = 30
_PLACES_BODY = "[0-9] [0-9]{0,39}"
"""With the same repeat as in other numbers, since compilers write each out once."""
_TAIL = '[0-9]{{0,39}} ("." {places})?'
_EXPONENT = '([eE] [+-]? ([0-9]{1,2} | "1" [0-9]{2}))?'
_SMALL = '[1-9] ("." {places})? [eE] "-" ("0" [5-9] | [1-9] [0-9])'
"""As Python spells binary64 below 0.0001."""
_SMALL_BELOW = 0.0002
_GREAT = '[1-9] ("." {places})? [eE] "+"? ("1" [6-9] | [2-9] [0-9] | "1" [0-9] [0-9])'
"""As Python spells binary64 from 10**16 on."""
_GREAT_FROM = 10**16
_LEAST = 10.0**-EXACT_DIGITS
_MEMBERS = 1_000
_DECIMALS = Context(prec=400)


@dataclass(frozen=True, slots=True)
class _Interval:
    """Magnitudes of one sign, bounds included; ``positive``: zero is not. high: None for no bound."""

    low: Number
    high: Number | None
    positive: bool


def decimals_expression(conditions: Conditions, rules: Rules) -> str | None:
    """The expression for the numbers that satisfy conditions; None where there is none. Raises
    ``Unwritable``."""
    if _contradiction(conditions):
        return None
    inexact = [step for step in conditions.steps if not step.of_decimals]
    try:
        if inexact:
            found = _members(conditions, rules)
            if found is None:
                raise Unwritable((step.source for step in inexact), INEXACT)
            return found
        found = _spelled(conditions, rules)
    except TooLarge:
        raise Unwritable(_refinements(conditions), TOO_LARGE) from None
    if found is None:
        found = texts_expression(_ends(conditions), rules)
    if found is None:
        raise Unwritable(conditions.literals, TOO_LARGE)
    return found


def _contradiction(conditions: Conditions) -> bool:
    """Whether it is plain that nothing satisfies the conditions."""
    low, high = conditions.low, conditions.high
    if low is not None and high is not None:
        if low.value > high.value:
            return True
        if low.value == high.value and not conditions.satisfied(low.value):
            return True
    exact = [step for step in conditions.steps if step.of_decimals]
    return any(
        one.decimal % other.decimal == 0
        for one in exact
        for other in exact
        if other.source.negated and not one.source.negated
    )


def _refinements(conditions: Conditions) -> list[Literal]:
    """The literals that make a grammar large, or else all."""
    found = [s for s in conditions.literals if s.keyword in ("multipleOf", "enum")]
    return found or list(conditions.literals)


def _ends(conditions: Conditions) -> Iterator[str]:
    """The bounds themselves where they satisfy the conditions."""
    for bound in (conditions.low, conditions.high):
        if bound is not None and conditions.satisfied(bound.value):
            yield json.dumps(bound.value)


def _members(conditions: Conditions, rules: Rules) -> str | None:
    """The multiples that the validator takes, in decimals; None if there are many, or none."""
    low, high = conditions.low, conditions.high
    steps = [step for step in conditions.steps if not step.source.negated]
    if low is None or high is None or not steps:
        return None
    step = max(s.decimal for s in steps)
    first, last = math.ceil(_fraction(low.value) / step), math.floor(_fraction(high.value) / step)
    if last - first >= _MEMBERS:
        return None
    places = max(s.places for s in steps)
    texts = list[str]()
    for count in range(first, last + 1):
        scaled = count * step * 10**places
        text = f"{Decimal(scaled.numerator).scaleb(-places, _DECIMALS):f}"
        if scaled.denominator == 1 and conditions.satisfied(json.loads(text)):
            texts += {text, _short(text)}
    return texts_expression(texts, rules)


def _short(text: str) -> str:
    """Decimals without zeros at the end."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def _fraction(value: Number) -> Fraction:
    return Fraction(repr(value))


def _spelled(conditions: Conditions, rules: Rules) -> str | None:
    plus, minus = _intervals(conditions)
    parts = list[str]()
    magnitudes = [
        _magnitudes(conditions, plus, 1, rules),
        _magnitudes(conditions, minus, -1, rules),
    ]
    plain = signed_expression(magnitudes[0], magnitudes[1], rules)
    refined = bool(conditions.steps or conditions.without - {0} or conditions.broken)
    if plain is not None and not refined and _only_sign(plus) and _only_sign(minus):
        return f"({plain} {rules.define('exponent', _EXPONENT)})"
    if plain is not None:
        parts.append(plain)
    if not conditions.steps:
        parts += _with_exponent(conditions, plus, "", rules)
        parts += _with_exponent(conditions, minus, '"-" ', rules)
    return one_of(parts) if parts else None


def _intervals(conditions: Conditions) -> tuple[_Interval | None, _Interval | None]:
    """Magnitudes without a sign, and with one."""
    bounds = conditions.written_bounds()
    low = None if bounds[0] is None else _inside(bounds[0], math.inf)
    high = None if bounds[1] is None else _inside(bounds[1], -math.inf)
    no_zero = 0 in conditions.without or any(b and b.open and b.value == 0 for b in bounds)
    plus = minus = None
    if high is None or high >= 0:
        least = low if low is not None and low > 0 else 0
        plus = _Interval(least, high, positive=no_zero and least == 0)
    if low is None or low < 0:
        least = -high if high is not None and high < 0 else 0
        minus = _Interval(least, None if low is None else -low, positive=no_zero and least == 0)
    return plus, minus


def _inside(bound: Bound, direction: float) -> Number:
    """The binary64 number at a bound, or next to it in a direction; zero also if it is open."""
    value = float(bound.value)
    outside = value < bound.value if direction > 0 else value > bound.value
    if outside or (bound.open and value == bound.value != 0):
        value = math.nextafter(value, direction)
    return value if abs(value) < 2**53 else int(value)


def _magnitudes(
    conditions: Conditions, interval: _Interval | None, sign: int, rules: Rules
) -> Magnitudes | None:
    if interval is None:
        return None
    without = [abs(v) for v in conditions.without if v * sign > 0]
    found = Magnitudes(
        low=_cut(interval.low, ROUND_CEILING) if interval.low or interval.positive else None,
        low_open=interval.positive,
        high=None if interval.high is None else _cut(interval.high, ROUND_FLOOR),
        fractions=True,
        places=_PLACES,
    )
    if not conditions.steps and not conditions.broken and not conditions.without - {0}:
        longest = max((len(cut.whole) for cut in found.cuts), default=0)
        places = rules.define("places", _PLACES_BODY)
        tail = _TAIL.format(places=places)
        return replace(found, limit=longest + 1, whole_tail=tail, more_tail=places)
    limit = EXACT_DIGITS - max((step.places for step in conditions.steps), default=0)
    if interval.low >= 10 ** (limit - 1):
        raise TooLarge
    cuts = [_cut(value, ROUND_FLOOR) for value in sorted(without) if value >= _LEAST]
    automata = [multiples(s.modulus, s.places, s.source.negated) for s in conditions.steps]
    automata += [multiples(1, 0, True)] * conditions.broken
    return replace(
        found,
        # What has more digits, or is smaller, is nothing that so few digits are read as.
        without=tuple(cut for cut in cuts if len(cut.whole + cut.fraction) <= limit),
        multiples=tuple(automata),
        limit=limit,
        total=True,
    )


def _cut(value: Number, rounding: str) -> Cut:
    exact = Decimal(repr(value))
    rounded = exact.quantize(Decimal(1).scaleb(-_PLACES), rounding, _DECIMALS)
    whole, _, fraction = f"{rounded:f}".partition(".")
    return Cut(whole, fraction.rstrip("0"))


def _only_sign(interval: _Interval | None) -> bool:
    return interval is None or (interval.low == 0 and interval.high is None)


def _with_exponent(
    conditions: Conditions, interval: _Interval | None, sign: str, rules: Rules
) -> Iterator[str]:
    """Spellings with an exponent that stay clear of the bounds."""
    if interval is None:
        return
    low, high = interval.low, interval.high
    places = rules.define("places", _PLACES_BODY)
    sizes = [abs(value) for value in conditions.without if value]
    if low == 0 and (high is None or high >= _SMALL_BELOW) and min(sizes, default=1) > _SMALL_BELOW:
        yield sign + rules.define("small", _SMALL.format(places=places))
    great = high is None and low <= _GREAT_FROM and max(sizes, default=0) < _GREAT_FROM
    if great and not conditions.broken:
        yield sign + rules.define("great", _GREAT.format(places=places))
