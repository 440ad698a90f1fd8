"""Numbers with and without a fraction, between bounds, without some values, multiples or not.

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

from service.schema_compiler.exact import Number, is_multiple, text_of, units
from service.schema_compiler.ir.values import NumberSet, Scientific, Suffix, Tail, WithSuffix
from service.schema_compiler.lower.digit_automata import TooLarge, finite, signed
from service.schema_compiler.lower.integers import any_of
from service.schema_compiler.lower.magnitudes import Cut, Magnitudes
from service.schema_compiler.lower.multiples import multiples
from service.schema_compiler.lower.number_constraints import (
    EXACT_DIGITS,
    TOO_LARGE,
    Bound,
    NumberConstraints,
    Unwritable,
)
from service.schema_compiler.normalize.constraints import Literal

_PLACES = 30
_SMALL_BELOW = Decimal("0.0002")
_LARGE_FROM = 10**16
"""Python writes binary64 below 0.0001 and from 10**16 on with an exponent."""
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


def decimals(constraints: NumberConstraints) -> NumberSet | None:
    """The numbers that satisfy constraints; None where there are none. Raises ``Unwritable``."""
    if _contradiction(constraints):
        return None
    try:
        found = _written(constraints)
        too_large = False
    except TooLarge:
        found, too_large = None, True
    if found is not None:
        return found
    texts = _members(constraints)
    if texts is None and not too_large:
        texts = _ends(constraints) or None
    if texts is None:
        blamed = _refinements(constraints) if too_large else constraints.literals
        raise Unwritable(blamed, TOO_LARGE)
    try:
        return finite(texts)
    except TooLarge:
        raise Unwritable(_refinements(constraints), TOO_LARGE) from None


def _contradiction(constraints: NumberConstraints) -> bool:
    """Whether it is plain that nothing satisfies the constraints."""
    low, high = constraints.low, constraints.high
    if low is not None and high is not None:
        if low.value > high.value:
            return True
        if low.value == high.value and not constraints.satisfied(low.value):
            return True
    return any(
        is_multiple(one.value, other.value)
        for one in constraints.steps
        for other in constraints.steps
        if other.source.negated and not one.source.negated
    )


def _refinements(constraints: NumberConstraints) -> tuple[Literal, ...]:
    """The literals that make a grammar large, or else all."""
    found = (s for s in constraints.literals if s.keyword in ("multipleOf", "enum"))
    return tuple(found) or constraints.literals


def _ends(constraints: NumberConstraints) -> list[str]:
    """The bounds themselves where they satisfy the constraints."""
    bounds = [bound.value for bound in (constraints.low, constraints.high) if bound is not None]
    return [text_of(value) for value in bounds if constraints.satisfied(value)]


def _members(constraints: NumberConstraints) -> list[str] | None:
    """The multiples between the bounds, if they are few; None if they are not."""
    low, high = constraints.low, constraints.high
    steps = [step for step in constraints.steps if not step.source.negated]
    if low is None or high is None or not steps:
        return None
    places = max(step.places for step in steps)
    modulus = math.lcm(*(step.modulus * 10 ** (places - step.places) for step in steps))
    least, most = units(low.value, places, up=True), units(high.value, places, up=False)
    if most - least >= _MEMBERS * modulus:
        return None
    first = -(-least // modulus) * modulus
    found = [Decimal(count).scaleb(-places, _DECIMALS) for count in range(first, most + 1, modulus)]
    texts = [f"{value:f}" for value in found if constraints.satisfied(value)]
    return list(dict.fromkeys(text for one in texts for text in (one, _short(one))))


def _short(text: str) -> str:
    """Decimals without zeros at the end."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def _written(constraints: NumberConstraints) -> NumberSet | None:
    plus, minus = _intervals(constraints)
    plain = _plain(constraints, plus, minus)
    if plain is not None and not _refined(constraints) and _only_sign(plus) and _only_sign(minus):
        return WithSuffix(plain, Suffix.EXPONENT)
    sets: list[NumberSet] = [] if plain is None else [plain]
    if not constraints.steps:
        sets += _with_exponent(constraints, plus, negative=False)
        sets += _with_exponent(constraints, minus, negative=True)
    return any_of(sets)


def _plain(
    constraints: NumberConstraints, plus: _Interval | None, minus: _Interval | None
) -> NumberSet | None:
    """Numbers without an exponent. Raises ``TooLarge``."""
    for limit in _LIMITS:
        try:
            return signed(
                _magnitudes(constraints, plus, 1, limit), _magnitudes(constraints, minus, -1, limit)
            )
        except TooLarge:
            if not _refined(constraints):
                raise
    raise TooLarge


def _refined(constraints: NumberConstraints) -> bool:
    """Whether the digits of a number have to be counted."""
    return bool(constraints.steps or constraints.without - {0} or constraints.broken)


def _intervals(constraints: NumberConstraints) -> tuple[_Interval | None, _Interval | None]:
    """Magnitudes without a sign, and with one."""
    bounds = constraints.written_bounds()
    low = None if bounds[0] is None else _inside(bounds[0], math.inf)
    high = None if bounds[1] is None else _inside(bounds[1], -math.inf)
    zero = Decimal(0)
    no_zero = 0 in constraints.without or any(b and b.open and b.value == 0 for b in bounds)
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
    constraints: NumberConstraints, interval: _Interval | None, sign: int, limit: int
) -> Magnitudes | None:
    """limit: digits of a number, where they have to be counted."""
    if interval is None:
        return None
    without = _sizes(v for v in constraints.without if (v > 0 if sign > 0 else v < 0))
    found = Magnitudes(
        low=_cut(interval.low, ROUND_CEILING) if interval.low or interval.positive else None,
        low_open=interval.positive,
        high=None if interval.high is None else _cut(interval.high, ROUND_FLOOR),
        fractions=True,
        places=_PLACES,
    )
    if not _refined(constraints):
        longest = max((len(cut.whole) for cut in found.cuts), default=0)
        tail = Tail.DIGITS_AND_FRACTION
        return replace(found, limit=longest + 1, whole_tail=tail, free_fraction=True)
    if interval.low >= 10 ** (limit - 1):
        raise TooLarge
    cuts = [_cut(value, ROUND_FLOOR) for value in sorted(without) if value >= _LEAST]
    automata = [multiples(s.modulus, s.places, s.source.negated) for s in constraints.steps]
    automata += [multiples(1, 0, True)] * constraints.broken
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
    constraints: NumberConstraints, interval: _Interval | None, *, negative: bool
) -> Iterator[NumberSet]:
    """Numbers with an exponent that stay clear of the bounds."""
    if interval is None:
        return
    low, high = interval.low, interval.high
    sizes = _sizes(value for value in constraints.without if value)
    if low == 0 and (high is None or high >= _SMALL_BELOW) and min(sizes, default=1) > _SMALL_BELOW:
        yield Scientific(small=True, negative=negative)
    large = high is None and low <= _LARGE_FROM and max(sizes, default=0) < _LARGE_FROM
    if large and not constraints.broken:
        yield Scientific(small=False, negative=negative)
