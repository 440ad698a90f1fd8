"""Conjunctions of keywords of numbers, sorted by what they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

from service.schema_compiler.exact import Number, is_multiple, is_whole, parts
from service.schema_compiler.normalize.constraints import Literal

LARGE, HUGE = 10**100, 10**250
"""Bounds beyond the first are not written; no number that is written reaches the second."""
EXACT_DIGITS = 15
"""Decimals of so many digits are different binary64 numbers, also for clients that read floats."""
TOO_LARGE = "is too large to be written together with the other keywords of the number"
BEYOND = "needs numbers of more than a hundred digits"
MAX_PLACES = 12
"""Digits after the point of a ``multipleOf`` that is written."""
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
    """One ``multipleOf`` with at most ``MAX_PLACES`` digits after the point."""

    source: Literal

    @property
    def value(self) -> Number:
        """As in the schema."""
        value: Number = self.source.value
        return value

    @cached_property
    def _parts(self) -> tuple[int, int]:
        return parts(self.value)

    @property
    def written(self) -> bool:
        """Whether it has so few digits after the point; the other properties need it."""
        return self._parts[1] >= -MAX_PLACES

    @property
    def places(self) -> int:
        """Digits after the point."""
        return max(0, -self._parts[1])

    @property
    def modulus(self) -> int:
        """The value in units of the last place."""
        digits, exponent = self._parts
        zeros: int = 10 ** max(0, exponent)
        return digits * zeros

    @property
    def fraction(self) -> Fraction:
        """The value; its numerator divides the integers that are multiples."""
        return Fraction(self.modulus, 10**self.places)


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound from below or above. open: it is excluded itself."""

    value: Number
    open: bool
    source: Literal


@dataclass(frozen=True, slots=True)
class NumberConstraints:
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
    def of(literals: Sequence[Literal]) -> NumberConstraints:
        """Sort literals; those that say nothing about numbers are left out. Raises
        ``Unwritable``."""
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
        fine = [step.source for step in steps if not step.written]
        if fine:
            raise Unwritable(fine, f"has more than {MAX_PLACES} digits after the point")
        excluded = (s.value for s in literals if s.keyword == "enum" and s.negated)
        typed = any(not s.negated for s in types)
        integral = any(not s.source.negated and s.places == 0 for s in steps)
        return NumberConstraints(
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
        if low is not None and low.value > LARGE:
            raise Unwritable([low.source], BEYOND)
        if high is not None and high.value < -LARGE:
            raise Unwritable([high.source], BEYOND)
        if low is not None and low.value < -LARGE:
            low = None if low.value <= -HUGE else Bound(-LARGE, True, low.source)
        if high is not None and high.value > LARGE:
            high = None if high.value >= HUGE else Bound(LARGE, True, high.source)
        far = any(LARGE < value < HUGE or -HUGE < value < -LARGE for value in self.without)
        if far:
            raise Unwritable([s for s in self.literals if s.keyword == "enum"], BEYOND)
        return low, high

    def satisfied(self, value: Number) -> bool:
        """Whether the validator takes a number."""
        whole = is_whole(value)
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
        return all(is_multiple(value, s.value) != s.source.negated for s in self.steps)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, Decimal)) and not isinstance(value, bool)


def _plain(value: Number) -> Number:
    return int(value) if is_whole(value) else value
