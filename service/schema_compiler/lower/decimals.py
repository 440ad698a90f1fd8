"""Numbers with and without a fraction, between bounds and more, as expressions.

Bounds are compared with digits. An open bound becomes the next binary64 number inside, so that no
number that is written is rounded to the bound by a client that reads floats. Where rounding could make
two numbers one (excluded values, multiples, no integers), numbers have at most 15 digits, which
binary64 tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from service.schema_compiler.emit.rules import Rules, one_of
from service.schema_compiler.exact import Number, is_multiple, text_of, units
from service.schema_compiler.lower.counted import TooLarge, signed_expression, texts_expression
from service.schema_compiler.lower.magnitudes import Cut, Magnitudes
from service.schema_compiler.lower.multiples import multiples
from service.schema_compiler.lower.number_constraints import (
    EXACT_DIGITS,
    TOO_LARGE,
    Bound,
    Conditions,
    Unwritable,
)
from service.schema_compiler.normalize.literals import Literal

_PLACES = 30
_PLACES_BODY = "[0-9] [0-9]{0,39}"
"""With the same repeat as in other numbers, since compilers write each out once."""
_TAIL = '[0-9]{{0,39}} ("." {places})?'
_EXPONENT = '([eE] [+-]? ([0-9]{1,2} | "1" [0-9]{2}))?'
_SMALL = '[1-9] ("." {places})? [eE] "-" ("0" [5-9] | [1-9] [0-9])'
"""As Python spells binary64 below 0.0001."""
_SMALL_BELOW = Decimal("0.0002")
_GREAT = '[1-9] ("." {places})? [eE] "+"? ("1" [6-9] | [2-9] [0-9] | "1" [0-9] [0-9])'
"""As Python spells binary64 from 10**16 on."""
_GREAT_FROM = 10**16
_LEAST = Decimal(10) ** -EXACT_DIGITS
_LIMITS = (EXACT_DIGITS, 12, 9)
"""Digits of numbers that have to be counted, as many as the automaton can have."""
_MEMBERS = 1_000
"""Numbers that are written one by one."""
_DECIMALS = Context(prec=400)


@dataclass(frozen=True, slots=True)
class _Interval:
    """Magnitudes of one sign, bounds included; ``positive``: zero is not. high: None for no bound."""

    low: Decimal
    high: Decimal | None
    positive: bool


def decimals_expression(conditions: Conditions, rules: Rules) -> str | None:
    """The expression for the numbers that satisfy conditions; None where there is none. Raises
    ``Unwritable``."""
    if _contradiction(conditions):
        return None
    try:
        found = _spelled(conditions, rules)
        too_large = False
    except TooLarge:
        found, too_large = None, True
    if found is not None:
        return found
    texts = _members(conditions)
    if texts is None and not too_large:
        texts = _ends(conditions) or None
    if texts is None:
        blamed = _refinements(conditions) if too_large else conditions.literals
        raise Unwritable(blamed, TOO_LARGE)
    try:
        return texts_expression(texts, rules)
    except TooLarge:
        raise Unwritable(_refinements(conditions), TOO_LARGE) from None


def _contradiction(conditions: Conditions) -> bool:
    """Whether it is plain that nothing satisfies the conditions."""
    low, high = conditions.low, conditions.high
    if low is not None and high is not None:
        if low.value > high.value:
            return True
        if low.value == high.value and not conditions.satisfied(low.value):
            return True
    return any(
        is_multiple(one.value, other.value)
        for one in conditions.steps
        for other in conditions.steps
        if other.source.negated and not one.source.negated
    )


def _refinements(conditions: Conditions) -> tuple[Literal, ...]:
    """The literals that make a grammar large, or else all."""
    found = (s for s in conditions.literals if s.keyword in ("multipleOf", "enum"))
    return tuple(found) or conditions.literals


def _ends(conditions: Conditions) -> list[str]:
    """The bounds themselves where they satisfy the conditions."""
    bounds = [bound.value for bound in (conditions.low, conditions.high) if bound is not None]
    return [text_of(value) for value in bounds if conditions.satisfied(value)]


def _members(conditions: Conditions) -> list[str] | None:
    """The multiples between the bounds, if they are few; None if they are not."""
    low, high = conditions.low, conditions.high
    steps = [step for step in conditions.steps if not step.source.negated]
    if low is None or high is None or not steps:
        return None
    places = max(step.places for step in steps)
    modulus = math.lcm(*(step.modulus * 10 ** (places - step.places) for step in steps))
    least, most = units(low.value, places, up=True), units(high.value, places, up=False)
    if most - least >= _MEMBERS * modulus:
        return None
    first = -(-least // modulus) * modulus
    found = [Decimal(count).scaleb(-places, _DECIMALS) for count in range(first, most + 1, modulus)]
    texts = [f"{value:f}" for value in found if conditions.satisfied(value)]
    return list(dict.fromkeys(text for one in texts for text in (one, _short(one))))


def _short(text: str) -> str:
    """Decimals without zeros at the end."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def _spelled(conditions: Conditions, rules: Rules) -> str | None:
    plus, minus = _intervals(conditions)
    parts = list[str]()
    plain = _plain(conditions, plus, minus, rules)
    if plain is not None and not _refined(conditions) and _only_sign(plus) and _only_sign(minus):
        return f"({plain} {rules.define('exponent', _EXPONENT)})"
    if plain is not None:
        parts.append(plain)
    if not conditions.steps:
        parts += _with_exponent(conditions, plus, "", rules)
        parts += _with_exponent(conditions, minus, '"-" ', rules)
    return one_of(parts) if parts else None


def _plain(
    conditions: Conditions, plus: _Interval | None, minus: _Interval | None, rules: Rules
) -> str | None:
    """Spellings without an exponent. Raises ``TooLarge``."""
    for limit in _LIMITS:
        try:
            return signed_expression(
                _magnitudes(conditions, plus, 1, limit, rules),
                _magnitudes(conditions, minus, -1, limit, rules),
                rules,
            )
        except TooLarge:
            if not _refined(conditions):
                raise
    raise TooLarge


def _refined(conditions: Conditions) -> bool:
    """Whether the digits of a number have to be counted."""
    return bool(conditions.steps or conditions.without - {0} or conditions.broken)


def _intervals(conditions: Conditions) -> tuple[_Interval | None, _Interval | None]:
    """Magnitudes without a sign, and with one."""
    bounds = conditions.written_bounds()
    low = None if bounds[0] is None else _inside(bounds[0], math.inf)
    high = None if bounds[1] is None else _inside(bounds[1], -math.inf)
    zero = Decimal(0)
    no_zero = 0 in conditions.without or any(b and b.open and b.value == 0 for b in bounds)
    plus = minus = None
    if high is None or high >= 0:
        least = low if low is not None and low > 0 else zero
        plus = _Interval(least, high, positive=no_zero and least == 0)
    if low is None or low < 0:
        least = high.copy_negate() if high is not None and high < 0 else zero
        most = None if low is None else low.copy_negate()
        minus = _Interval(least, most, positive=no_zero and least == 0)
    return plus, minus


def _inside(bound: Bound, direction: float) -> Decimal:
    """A bound, or where it is open the next binary64 number in a direction; zero also if it is
    open."""
    if not bound.open or bound.value == 0:
        return Decimal(bound.value)
    return Decimal(repr(math.nextafter(float(bound.value), direction)))


def _magnitudes(
    conditions: Conditions, interval: _Interval | None, sign: int, limit: int, rules: Rules
) -> Magnitudes | None:
    """limit: digits of a number, where they have to be counted."""
    if interval is None:
        return None
    without = _sizes(v for v in conditions.without if (v > 0 if sign > 0 else v < 0))
    found = Magnitudes(
        low=_cut(interval.low, ROUND_CEILING) if interval.low or interval.positive else None,
        low_open=interval.positive,
        high=None if interval.high is None else _cut(interval.high, ROUND_FLOOR),
        fractions=True,
        places=_PLACES,
    )
    if not _refined(conditions):
        longest = max((len(cut.whole) for cut in found.cuts), default=0)
        places = rules.define("places", _PLACES_BODY)
        tail = _TAIL.format(places=places)
        return replace(found, limit=longest + 1, whole_tail=tail, more_tail=places)
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


def _sizes(values: Iterable[Number]) -> list[Decimal]:
    return [Decimal(value).copy_abs() for value in values]


def _cut(value: Decimal, rounding: str) -> Cut:
    rounded = value.quantize(Decimal(1).scaleb(-_PLACES), rounding, _DECIMALS)
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
    sizes = _sizes(value for value in conditions.without if value)
    if low == 0 and (high is None or high >= _SMALL_BELOW) and min(sizes, default=1) > _SMALL_BELOW:
        yield sign + rules.define("small", _SMALL.format(places=places))
    great = high is None and low <= _GREAT_FROM and max(sizes, default=0) < _GREAT_FROM
    if great and not conditions.broken:
        yield sign + rules.define("great", _GREAT.format(places=places))
