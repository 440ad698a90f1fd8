"""Integers between bounds, without some values, multiples or not, as expressions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from service.schema_compiler.emit.rules import Rules, literal, one_of
from service.schema_compiler.lower.counted import TooLarge, signed_expression, texts_expression
from service.schema_compiler.lower.magnitudes import Cut, Magnitudes
from service.schema_compiler.lower.multiples import multiples
from service.schema_compiler.lower.number_constraints import (
    EXACT_DIGITS,
    TOO_LARGE,
    Conditions,
    Unwritable,
)

_LIMITS = (20, 12, 9)
"""Digits of integers that have to be counted, as many as the automaton can have: first all of 64
bits."""
_TAIL = "[0-9]{0,39}"
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


def integers_expression(conditions: Conditions, rules: Rules) -> str | None:
    """The expression for the integers that satisfy conditions; None where there is none. Raises
    ``Unwritable``."""
    low, high = conditions.written_bounds()
    least = None if low is None else math.floor(low.value) + 1 if low.open else math.ceil(low.value)
    most = (
        None if high is None else math.ceil(high.value) - 1 if high.open else math.floor(high.value)
    )
    if least is not None and most is not None and least > most:
        return None
    numerators = [(step.fraction.numerator, step.source.negated) for step in conditions.steps]
    wanted = _Integers(
        least,
        most,
        frozenset(value for value in conditions.without if isinstance(value, int)),
        math.lcm(*(numerator for numerator, negated in numerators if not negated)),
        tuple(numerator for numerator, negated in numerators if negated),
        None,
    )
    if any(wanted.modulus % other == 0 for other in wanted.others):
        return None
    try:
        return _spelled(wanted, rules, typed=conditions.typed)
    except TooLarge:
        members = wanted.members()
        if members is not None:
            texts = (str(value) for value in members if value in wanted)
            return texts_expression(texts, rules)
        raise _too_large(conditions) from None


def _too_large(conditions: Conditions) -> Unwritable:
    steps = [s.source for s in conditions.steps]
    return Unwritable(steps or [s for s in conditions.literals if s.keyword == "enum"], TOO_LARGE)


def _spelled(wanted: _Integers, rules: Rules, *, typed: bool) -> str | None:
    """Integers, and where no ``type`` asks for them, also with zeros after a point."""
    plain = _scaled(wanted, rules)
    if plain is None or typed or wanted.modulus >= 10**EXACT_DIGITS:
        return plain
    try:
        pointed = _scaled(replace(wanted, limit=EXACT_DIGITS), rules)
    except TooLarge:
        return plain
    return f'({plain} | {pointed} "." [0]{{1,6}})'


def _scaled(wanted: _Integers, rules: Rules) -> str | None:
    """Powers of ten are zeros at the end."""
    zeros = 0
    while wanted.modulus % 10 ** (zeros + 1) == 0:
        zeros += 1
    if not zeros:
        return _counted(wanted, rules)
    unit = 10**zeros
    scaled = _Integers(
        None if wanted.low is None else -(-wanted.low // unit),
        None if wanted.high is None else wanted.high // unit,
        frozenset(v // unit for v in wanted.without if v % unit == 0) | {0},
        wanted.modulus // unit,
        tuple(other // math.gcd(other, unit) for other in wanted.others),
        None if wanted.limit is None else wanted.limit - zeros,
    )
    found = _counted(scaled, rules)
    parts = [] if found is None else [f"{found} {literal('0' * zeros)}"]
    if 0 in wanted:
        parts.append('"0"')
    return one_of(parts) if parts else None


def _counted(wanted: _Integers, rules: Rules) -> str | None:
    """With as many digits as the automaton can have. Raises ``TooLarge``."""
    bounds = [len(str(abs(v))) for v in (wanted.low, wanted.high) if v is not None]
    longest = max(bounds, default=0)
    counted = wanted.modulus > 1 or wanted.others or wanted.limit is not None
    if not counted:
        longest = max([longest, *(len(str(abs(value))) for value in wanted.without)])
        return _signed(wanted, longest + 1, rules, free=True)
    most = _LIMITS[0] if wanted.limit is None else wanted.limit
    limits = [limit for limit in (most, *_LIMITS) if longest < limit <= most]
    if not limits:
        limits = [longest + 1 if wanted.limit is None else wanted.limit]
    for limit in dict.fromkeys(limits):
        try:
            found = _signed(wanted, limit, rules, free=False)
        except TooLarge:
            continue
        complete = len(bounds) == 2 and longest <= limit
        if found is not None or complete:
            return found
    raise TooLarge


def _signed(wanted: _Integers, limit: int, rules: Rules, *, free: bool) -> str | None:
    """Integers of at most ``limit`` digits before a free tail, with both signs."""
    low, high = wanted.low, wanted.high
    automata = [multiples(wanted.modulus, 0, False)] if wanted.modulus > 1 else []
    automata += [multiples(other, 0, True) for other in wanted.others]
    both = Magnitudes(
        multiples=tuple(automata),
        limit=limit,
        whole_tail=_TAIL if free else None,
    )
    machines: list[Magnitudes | None] = [None, None]
    if high is None or high >= 0:
        machines[0] = replace(
            both,
            low=Cut(str(low)) if low is not None and low > 0 else None,
            high=None if high is None else Cut(str(high)),
            without=tuple(Cut(str(v)) for v in sorted(wanted.without) if v >= 0),
        )
    if low is None or low < 0:
        machines[1] = replace(
            both,
            zero=False,
            low=Cut(str(-high)) if high is not None and high < -1 else None,
            high=None if low is None else Cut(str(-low)),
            without=tuple(Cut(str(-v)) for v in sorted(wanted.without) if v < 0),
        )
    return signed_expression(machines[0], machines[1], rules)
