"""Magnitudes in plain decimals: between bounds, without some values, multiples or not."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from service.tasks.grammars.counted import DIGITS

_ZEROS = 16
"""Digits after the point in which a number may stay equal to a bound."""


class Cut(NamedTuple):
    """A magnitude that numbers are compared with, in plain decimals: ``whole`` without leading
    zeros ("0" for zero), ``fraction`` without trailing ones."""

    whole: str
    fraction: str = ""


class Residue(NamedTuple):
    """Numbers are multiples of ``modulus / 10**places``; with ``negated``, are none."""

    modulus: int
    places: int = 0
    negated: bool = False


class _State(NamedTuple):
    """digits: before the point, or with a limit in total, of all. places: digits after it.
    orders: comparison with each cut so far. rests: per residue, the remainder, and whether a digit
    beyond its places is not zero. broken: a digit after the point is not zero."""

    phase: int
    digits: int
    places: int
    orders: tuple[int, ...]
    rests: tuple[tuple[int, bool], ...]
    broken: bool


_START, _ZERO, _WHOLE, _POINT, _FRACTION = range(5)


@dataclass(frozen=True, slots=True)
class Magnitudes:
    """The magnitudes (numbers without sign) that satisfy bounds and more.

    low, high: bounds, and whether they are excluded themselves. without: values that are excluded.
    zero: whether the first digit may be zero. fractions: whether there may be a point.
    broken: no integers. limit: digits before the point, with ``total`` of all. places: digits after
    the point.
    whole_tail, more_tail: where nothing is left to decide, the expressions for the rest of a number
    before and after the point; None where digits have to be counted.
    """

    low: Cut | None = None
    low_open: bool = False
    high: Cut | None = None
    high_open: bool = False
    without: tuple[Cut, ...] = ()
    residues: tuple[Residue, ...] = ()
    zero: bool = True
    fractions: bool = False
    broken: bool = False
    limit: int = 18
    total: bool = False
    places: int = 30
    whole_tail: str | None = None
    more_tail: str | None = None

    @property
    def symbols(self) -> str:
        """See `Machine`."""
        return "." + DIGITS if self.fractions else DIGITS

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Everything that a number is compared with: lower bound, upper bound, the others."""
        bounds = tuple(cut for cut in (self.low, self.high) if cut is not None)
        return bounds + self.without

    def start(self) -> Hashable:
        """See `Machine`."""
        rests = ((0, False),) * len(self.residues)
        return _State(_START, 0, 0, (0,) * len(self.cuts), rests, False)

    def step(self, state: Hashable, symbol: str) -> Hashable | None:
        """See `Machine`."""
        if not isinstance(state, _State):
            return None
        if symbol == ".":
            return self._point(state)
        if state.phase == _ZERO or (state.phase == _START and symbol == "0" and not self.zero):
            return None
        return (
            self._fraction(state, symbol) if state.phase >= _POINT else self._whole(state, symbol)
        )

    def final(self, state: Hashable) -> str | None:
        """See `Machine`."""
        if isinstance(state, str):
            return state
        assert isinstance(state, _State)
        if state.phase in (_START, _POINT) or (self.broken and not state.broken):
            return None
        if not self._allowed(self._decided(state), complete=True):
            return None
        for residue, (rest, beyond) in zip(self.residues, state.rests, strict=True):
            missing = max(0, residue.places - state.places)
            multiple = not beyond and rest * 10**missing % residue.modulus == 0
            if multiple == residue.negated:
                return None
        return ""

    def _whole(self, state: _State, digit: str) -> Hashable | None:
        count = state.digits + 1
        if count > self.limit or (self.high is not None and count > len(self.high.whole)):
            return None
        orders = tuple(
            1 if count > len(cut.whole) else order or _order(digit, cut.whole[count - 1])
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        phase = _ZERO if state.phase == _START and digit == "0" else _WHOLE
        longest = max((len(cut.whole) for cut in self.cuts), default=0)
        if self.whole_tail is not None and count > longest and phase == _WHOLE:
            return self.whole_tail
        rests = tuple(
            ((10 * rest + int(digit)) % residue.modulus, False)
            for residue, (rest, _) in zip(self.residues, state.rests, strict=True)
        )
        return _State(phase, count, 0, orders, rests, False)

    def _point(self, state: _State) -> Hashable | None:
        if state.phase not in (_ZERO, _WHOLE) or (self.total and state.digits >= self.limit):
            return None
        orders = tuple(
            order if state.digits == len(cut.whole) else -1 if state.digits < len(cut.whole) else 1
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        return self._after_point(state._replace(phase=_POINT, orders=orders))

    def _fraction(self, state: _State, digit: str) -> Hashable | None:
        place = state.places
        longest = max((len(cut.fraction) for cut in self.cuts), default=0)
        if place >= min(self.places, longest + _ZEROS):
            return None
        if self.total and state.digits >= self.limit:
            return None
        orders = tuple(
            order or _order(digit, cut.fraction[place] if place < len(cut.fraction) else "0")
            for order, cut in zip(state.orders, self.cuts, strict=True)
        )
        rests: list[tuple[int, bool]] = []
        for residue, (rest, beyond) in zip(self.residues, state.rests, strict=True):
            if place < residue.places:
                rests.append(((10 * rest + int(digit)) % residue.modulus, False))
            else:
                rests.append((rest, beyond or digit != "0"))
            if rests[-1][1] and not residue.negated:
                return None
        broken = self.broken and (state.broken or digit != "0")
        count = state.digits + self.total
        return self._after_point(_State(_FRACTION, count, place + 1, orders, tuple(rests), broken))

    def _after_point(self, state: _State) -> Hashable | None:
        if not self._allowed(state.orders, complete=False):
            return None
        if self.more_tail is not None and all(state.orders):
            return self.more_tail if state.phase == _FRACTION else f"[0-9] {self.more_tail}"
        if self.total:  # the places are counted with all digits, except for what they still mean
            used = [len(cut.fraction) + 1 for cut in self.cuts] + [r.places for r in self.residues]
            return state._replace(places=min(state.places, max(used, default=0)))
        return state

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
