"""Conjunctions of keywords of numbers, sorted by what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from service.tasks.grammars.literals import Literal

Number = int | float

LARGE, HUGE = 10**100, 10**220
"""Bounds beyond the first are not written; no number that is written reaches the second."""
EXACT_DIGITS = 15
"""Decimals of so many digits are different binary64 numbers, and integers are exact."""
TOO_LARGE = "is too large to be written together with the other keywords of the number"
INEXACT = "is no fraction of a power of two, and the final validation divides in binary64"
BEYOND = "needs numbers of more than a hundred digits"
_MAX_MODULUS = 10**6
_MAX_PLACES = 6
_HALF_ULP = Fraction(1, 2**54)
_OPPOSITE = {
    "minimum": "exclusiveMaximum",
    "exclusiveMaximum": "minimum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
}


class Unwritable(Exception):
    """Literals that no grammar is written for, and why."""

    def __init__(self, literals: Iterable[Literal], reason: str) -> None:
        self.literals = tuple(literals)
        self.reason = reason


@dataclass(frozen=True)
class Step:
    """One ``multipleOf``, as it is written in decimals."""

    source: Literal

    @property
    def value(self) -> Number:
        """As in the schema."""
        value: Number = self.source.value
        return value

    @cached_property
    def decimal(self) -> Fraction:
        """The decimals that stand in the schema."""
        return Fraction(repr(self.value)) if isinstance(self.value, float) else Fraction(self.value)

    @cached_property
    def places(self) -> int:
        """Digits after the point; no more than are of use."""
        return next((n for n in range(_MAX_PLACES) if self.decimal * 10**n % 1 == 0), _MAX_PLACES)

    @property
    def modulus(self) -> int:
        """``decimal`` in units of the last place."""
        return int(self.decimal * 10**self.places)

    @cached_property
    def error(self) -> Fraction:
        """Of binary64, relative to what is written."""
        return abs(Fraction(self.value) / self.decimal - 1)

    @property
    def of_decimals(self) -> bool:
        """Whether the validator takes exactly the multiples, among decimals of few digits.

        What is a multiple is then held by binary64, and its quotient, which is an integer; what is
        none has a quotient that differs from every integer by more than rounding.
        """
        short = (self.decimal * 10**self.places).denominator == 1
        return short and self.error == 0 and self.modulus <= _MAX_MODULUS

    @property
    def of_integers(self) -> bool:
        """The same among integers. The validator's quotient is then the integer, with an error of
        at most half of the distance to the next binary64."""
        if isinstance(self.value, int):
            return True
        if self.source.negated:
            return self.of_decimals
        short = (self.decimal * 10**self.places).denominator == 1
        return short and self.error <= _HALF_ULP


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound from below or above. open: it is excluded itself."""

    value: Number
    open: bool
    source: Literal


@dataclass(frozen=True, slots=True)
class Conditions:
    """What numbers have to satisfy.

    low, high: the tightest bounds. steps: of ``multipleOf``, also negated. without: excluded values,
    integral ones as int. integers: they are integers, since a keyword says so; ``typed``: ``type``
    does. broken: they are no integers.
    """

    literals: tuple[Literal, ...]
    low: Bound | None
    high: Bound | None
    steps: tuple[Step, ...]
    without: frozenset[Number]
    integers: bool
    typed: bool
    broken: bool

    @staticmethod
    def of(literals: Sequence[Literal]) -> Conditions:
        """Sort literals; those that say nothing about numbers are left out."""
        lows, highs = list[Bound](), list[Bound]()
        for source in literals:
            keyword = source.keyword
            if keyword not in _OPPOSITE:
                continue
            keyword = _OPPOSITE[keyword] if source.negated else keyword
            bound = Bound(source.value, keyword.startswith("exclusive"), source)
            (lows if keyword.lower().endswith("minimum") else highs).append(bound)
        types = [s for s in literals if s.keyword == "type" and s.value == "integer"]
        steps = tuple(Step(s) for s in literals if s.keyword == "multipleOf")
        excluded = (s.value for s in literals if s.keyword == "enum" and s.negated)
        typed = any(not s.negated for s in types)
        integral = any(not s.source.negated and s.decimal.denominator == 1 for s in steps)
        return Conditions(
            literals=tuple(literals),
            low=max(lows, key=lambda b: (b.value, b.open), default=None),
            high=min(highs, key=lambda b: (b.value, not b.open), default=None),
            steps=steps,
            without=frozenset(_plain(v) for values in excluded for v in values if _is_number(v)),
            integers=typed or integral,
            typed=typed,
            broken=any(s.negated for s in types),
        )

    def written_bounds(self) -> tuple[Bound | None, Bound | None]:
        """The bounds, without those that no number that is written reaches. Raises ``Unwritable``."""
        low, high = self.low, self.high
        for bound, sign in ((low, 1), (high, -1)):
            if bound is not None and bound.value * sign > LARGE:
                raise Unwritable([bound.source], BEYOND)
        if low is not None and low.value < -LARGE:
            low = None if low.value <= -HUGE else Bound(-LARGE, True, low.source)
        if high is not None and high.value > LARGE:
            high = None if high.value >= HUGE else Bound(LARGE, True, high.source)
        far = any(LARGE < abs(value) < HUGE for value in self.without)
        if far:
            raise Unwritable([s for s in self.literals if s.keyword == "enum"], BEYOND)
        return low, high

    def satisfied(self, value: Number) -> bool:
        """Whether the validator takes a number."""
        whole = isinstance(value, int) or value.is_integer()
        if (self.typed and not whole) or (self.broken and whole) or value in self.without:
            return False
        if self.low is not None and (
            value < self.low.value or (self.low.open and value == self.low.value)
        ):
            return False
        if self.high is not None and (
            value > self.high.value or (self.high.open and value == self.high.value)
        ):
            return False
        return all(_multiple(value, s.value) != s.source.negated for s in self.steps)


def _multiple(value: Number, step: Number) -> bool:
    if isinstance(step, int):
        return value % step == 0
    try:
        quotient = value / step
        return int(quotient) == quotient
    except OverflowError:
        return Fraction(value) % Fraction(step) == 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Number) -> Number:
    return int(value) if isinstance(value, float) and value.is_integer() else value
