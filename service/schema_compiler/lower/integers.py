"""Integers between bounds, without some values, multiples or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.schema_compiler.ir.values import (
    AnyNumber,
    NumberSet,
    Suffix,
    Tail,
    WithSuffix,
    Zero,
)
from service.schema_compiler.lower.digit_automata import TooLarge, finite, signed
from service.schema_compiler.lower.magnitudes import Cut, Magnitudes
from service.schema_compiler.lower.multiples import multiples
from service.schema_compiler.lower.number_constraints import (
    EXACT_DIGITS,
    TOO_LARGE,
    NumberConstraints,
    Unwritable,
)

_LIMITS = (20, 12, 9)
"""Digits of integers that have to be counted, as many as the automaton can have: first all of 64
bits."""
_MEMBERS = 1_000
"""Numbers that are written one by one."""


@dataclass(frozen=True, slots=True)
class _Integers:
    """Integers from ``low`` to ``high``, both included, that are multiples of ``modulus`` and of none
    of ``others``. limit: digits of a number, None for as many as may be."""

    low: int | None
    high: int | None
    without: frozenset[int]
    modulus: int
    others: tuple[int, ...]
    limit: int | None

    def __contains__(self, value: int) -> bool:
        return (
            (self.low is None or self.low <= value)
            and (self.high is None or value <= self.high)
            and value not in self.without
            and value % self.modulus == 0
            and all(value % other for other in self.others)
        )

    def members(self) -> range | None:
        """The multiples of ``modulus`` between the bounds, if they are few."""
        if self.low is None or self.high is None:
            return None
        first = -(-self.low // self.modulus) * self.modulus
        found = range(first, self.high + 1, self.modulus)
        return found if self.high - first < _MEMBERS * self.modulus else None


def integers(constraints: NumberConstraints) -> NumberSet | None:
    """The integers that satisfy constraints; None where there are none. Raises ``Unwritable``."""
    low, high = constraints.written_bounds()
    least = None if low is None else math.floor(low.value) + 1 if low.open else math.ceil(low.value)
    most = (
        None if high is None else math.ceil(high.value) - 1 if high.open else math.floor(high.value)
    )
    if least is not None and most is not None and least > most:
        return None
    numerators = [(step.fraction.numerator, step.source.negated) for step in constraints.steps]
    asked = _Integers(
        least,
        most,
        frozenset(value for value in constraints.without if isinstance(value, int)),
        math.lcm(*(numerator for numerator, negated in numerators if not negated)),
        tuple(numerator for numerator, negated in numerators if negated),
        None,
    )
    if any(asked.modulus % other == 0 for other in asked.others):
        return None
    try:
        return _written(asked, typed=constraints.typed)
    except TooLarge:
        members = asked.members()
        if members is not None:
            return finite(str(value) for value in members if value in asked)
        raise _too_large(constraints) from None


def _too_large(constraints: NumberConstraints) -> Unwritable:
    steps = [s.source for s in constraints.steps]
    return Unwritable(steps or [s for s in constraints.literals if s.keyword == "enum"], TOO_LARGE)


def _written(asked: _Integers, *, typed: bool) -> NumberSet | None:
    """Integers, and where no ``type`` asks for them, also with zeros after a point."""
    plain = _scaled(asked)
    if plain is None or typed or asked.modulus >= 10**EXACT_DIGITS:
        return plain
    try:
        pointed = _scaled(replace(asked, limit=EXACT_DIGITS))
    except TooLarge:
        return plain
    if pointed is None:
        return plain
    return AnyNumber((plain, WithSuffix(pointed, Suffix.ZERO_FRACTION)))


def _scaled(asked: _Integers) -> NumberSet | None:
    """Powers of ten are zeros at the end."""
    zeros = 0
    while asked.modulus % 10 ** (zeros + 1) == 0:
        zeros += 1
    if not zeros:
        return _counted(asked)
    unit = 10**zeros
    scaled = _Integers(
        None if asked.low is None else -(-asked.low // unit),
        None if asked.high is None else asked.high // unit,
        frozenset(v // unit for v in asked.without if v % unit == 0) | {0},
        asked.modulus // unit,
        tuple(other // math.gcd(other, unit) for other in asked.others),
        None if asked.limit is None else asked.limit - zeros,
    )
    found = _counted(scaled)
    sets: list[NumberSet] = [] if found is None else [WithSuffix(found, zeros)]
    if 0 in asked:
        sets.append(Zero())
    return any_of(sets)


def any_of(sets: Sequence[NumberSet]) -> NumberSet | None:
    """Numbers of any of the sets; None for no set."""
    return AnyNumber(tuple(sets)) if len(sets) > 1 else next(iter(sets), None)


def _counted(asked: _Integers) -> NumberSet | None:
    """With as many digits as the automaton can have. Raises ``TooLarge``."""
    bounds = [len(str(abs(v))) for v in (asked.low, asked.high) if v is not None]
    longest = max(bounds, default=0)
    counted = asked.modulus > 1 or asked.others or asked.limit is not None
    if not counted:
        longest = max([longest, *(len(str(abs(value))) for value in asked.without)])
        return _signed(asked, longest + 1, free=True)
    most = _LIMITS[0] if asked.limit is None else asked.limit
    limits = [limit for limit in (most, *_LIMITS) if longest < limit <= most]
    if not limits:
        limits = [longest + 1 if asked.limit is None else asked.limit]
    for limit in dict.fromkeys(limits):
        try:
            found = _signed(asked, limit, free=False)
        except TooLarge:
            continue
        complete = len(bounds) == 2 and longest <= limit
        if found is not None or complete:
            return found
    raise TooLarge


def _signed(asked: _Integers, limit: int, *, free: bool) -> NumberSet | None:
    """Integers of at most ``limit`` digits before a free tail, with both signs."""
    low, high = asked.low, asked.high
    automata = [multiples(asked.modulus, 0, False)] if asked.modulus > 1 else []
    automata += [multiples(other, 0, True) for other in asked.others]
    both = Magnitudes(
        multiples=tuple(automata),
        limit=limit,
        whole_tail=Tail.DIGITS if free else None,
    )
    machines: list[Magnitudes | None] = [None, None]
    if high is None or high >= 0:
        machines[0] = replace(
            both,
            low=Cut(str(low)) if low is not None and low > 0 else None,
            high=None if high is None else Cut(str(high)),
            without=tuple(Cut(str(v)) for v in sorted(asked.without) if v >= 0),
        )
    if low is None or low < 0:
        machines[1] = replace(
            both,
            zero=False,
            low=Cut(str(-high)) if high is not None and high < -1 else None,
            high=None if low is None else Cut(str(-low)),
            without=tuple(Cut(str(-v)) for v in sorted(asked.without) if v < 0),
        )
    return signed(machines[0], machines[1])
