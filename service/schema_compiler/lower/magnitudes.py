"""Magnitudes in plain decimals: between bounds, without some values, multiples or not."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from service.schema_compiler.ir.values import Tail
from service.schema_compiler.lower.digit_automata import DIGITS
from service.schema_compiler.lower.multiples import Multiples

_ZEROS = 16
"""Digits after the point in which a number may stay equal to a bound."""


class Cut(NamedTuple):
    """A magnitude that numbers are compared with, in plain decimals: ``whole`` without leading
    zeros ("0" for zero), ``fraction`` without trailing ones."""

    whole: str
    fraction: str = ""


class _State(NamedTuple):
    """digits: before the point, or with a limit in total, of all. places: digits after it.
    orders: comparison with each cut so far. rests: state of each automaton of multiples."""

    phase: int
    digits: int
    places: int
    orders: tuple[int, ...]
    rests: tuple[int, ...]


_START, _ZERO, _WHOLE, _POINT, _FRACTION = range(5)


@dataclass(frozen=True)
class Magnitudes:
    """The magnitudes (numbers without sign) that satisfy bounds and more.

    low, high: bounds, and whether they are excluded themselves. without: values that are excluded.
    multiples: automata that have to take a number, too. zero: whether the first digit may be zero.
    fractions: whether there may be a point. limit: digits before the point, with ``total`` of all.
    places: digits after the point.
    whole_tail: the rest of a number before the point, where nothing is left to decide; None where digits
    have to be counted. free_fraction: where nothing is left to decide, any digits may follow the point.
    """

    low: Cut | None = None
    low_open: bool = False
    high: Cut | None = None
    high_open: bool = False
    without: tuple[Cut, ...] = ()
    multiples: tuple[Multiples, ...] = ()
    zero: bool = True
    fractions: bool = False
    limit: int = 18
    total: bool = False
    places: int = 30
    whole_tail: Tail | None = None
    free_fraction: bool = False

    @cached_property
    def symbols(self) -> str:
        """See `Machine`."""
        return "." + DIGITS if self.fractions else DIGITS

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Everything that a number is compared with: lower bound, upper bound, the others."""
        bounds = tuple(cut for cut in (self.low, self.high) if cut is not None)
        return bounds + self.without

    @cached_property
    def _longest(self) -> tuple[int, int]:
        """Digits of cuts before and after the point, at most."""
        return (
            max((len(cut.whole) for cut in self.cuts), default=0),
            max((len(cut.fraction) for cut in self.cuts), default=0),
        )

    def start(self) -> Hashable:
        """See `Machine`."""
        rests = (0,) * len(self.multiples)
        return _State(_START, 0, 0, (0,) * len(self.cuts), rests)

    def step(self, state: Hashable, symbol: str) -> Hashable | None:
        """See `Machine`."""
        if not isinstance(state, _State):
            return None
        if state.phase in (_START, _POINT) if symbol == "." else state.phase == _ZERO:
            return None
        rests = []
        for automaton, rest in zip(self.multiples, state.rests, strict=True):
            after = automaton.moves[rest].get(symbol)
            if after is None:
                return None
            rests.append(after)
        state = state._replace(rests=tuple(rests))
        if symbol == ".":
            return self._point(state)
        return self._whole(state, symbol) if state.phase < _POINT else self._place(state, symbol)

    def tail(self, state: Hashable) -> Tail | None:
        """See `Machine`."""
        if isinstance(state, Tail):
            return state
        assert isinstance(state, _State)
        if state.phase in (_START, _POINT):
            return None
        pairs = zip(self.multiples, state.rests, strict=True)
        if any(rest not in automaton.ends for automaton, rest in pairs):
            return None
        return Tail.NOTHING if self._allowed(self._decided(state), complete=True) else None

    def _whole(self, state: _State, digit: str) -> Hashable | None:
        """After a digit before the point."""
        phase = _ZERO if state.phase == _START and digit == "0" else _WHOLE
        digits = state.digits + 1
        if digits > self.limit or (phase == _ZERO and not self.zero):
            return None
        if self.high is not None and digits > len(self.high.whole):
            return None
        if self.whole_tail is not None and digits > self._longest[0] and phase == _WHOLE:
            return self.whole_tail
        orders = self._orders(
            1 if digits > len(cut.whole) else order or _order(digit, cut.whole[digits - 1])
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        return _State(phase, digits, 0, orders, state.rests)

    def _point(self, state: _State) -> Hashable | None:
        if state.phase == _FRACTION or (self.total and state.digits >= self.limit):
            return None
        orders = self._orders(
            order if state.digits == len(cut.whole) else -1 if state.digits < len(cut.whole) else 1
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        return self._after_point(state._replace(phase=_POINT, orders=orders))

    def _place(self, state: _State, digit: str) -> Hashable | None:
        """After a digit after the point."""
        place = state.places
        if place >= min(self.places, self._longest[1] + _ZEROS):
            return None
        if self.total and state.digits >= self.limit:
            return None
        orders = self._orders(
            order or _order(digit, cut.fraction[place] if place < len(cut.fraction) else "0")
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        digits = state.digits + self.total
        return self._after_point(_State(_FRACTION, digits, place + 1, orders, state.rests))

    def _after_point(self, state: _State) -> Hashable | None:
        if not self._allowed(state.orders, complete=False):
            return None
        if self.free_fraction and all(state.orders):
            return Tail.MORE_FRACTION if state.phase == _FRACTION else Tail.FRACTION
        if self.total:  # places are counted with all digits, so these matter to comparisons only
            return state._replace(places=min(state.places, self._longest[1] + 1))
        return state

    def _orders(self, orders: Iterable[int]) -> tuple[int, ...]:
        """Comparisons; for excluded values it is enough to know whether they differ."""
        found = tuple(orders)
        bounds = len(found) - len(self.without)
        return found[:bounds] + tuple(abs(order) for order in found[bounds:])

    def _decided(self, state: _State) -> tuple[int, ...]:
        """The comparisons of a number that ends here."""
        if state.phase == _FRACTION:
            return tuple(
                order or (-1 if state.places < len(cut.fraction) else 0)
                for order, cut in zip(state.orders, self.cuts, strict=True)
            )
        return tuple(
            -1 if state.digits < len(cut.whole) else order or (-1 if cut.fraction else 0)
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )

    def _allowed(self, orders: tuple[int, ...], *, complete: bool) -> bool:
        """Whether comparisons satisfy the bounds; those that are not complete may stay equal."""
        ordered = list(orders)
        if self.low is not None:
            order = ordered.pop(0)
            if order < 0 or (complete and self.low_open and order == 0):
                return False
        if self.high is not None:
            order = ordered.pop(0)
            if order > 0 or (complete and self.high_open and order == 0):
                return False
        return not complete or 0 not in ordered


def _order(digit: str, other: str) -> int:
    return (digit > other) - (digit < other)
