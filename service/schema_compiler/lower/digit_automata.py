"""Finite automata over the characters of numbers.

They have no cycles, since the digits of a number are counted. Building them from their ends, with equal
states as one, makes them minimal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from service.schema_compiler.ir.values import Digits, DigitState, Tail

MAX_EXPLORED = 3_000
"""States that are explored for one automaton."""
MAX_STATES = 400
"""States of a minimal automaton."""
DIGITS = "0123456789"


class TooLarge(Exception):
    """The automaton has too many states."""


class Machine(Protocol):
    """An automaton by its rules; its states are hashable values of any type."""

    def start(self) -> Hashable: ...

    def step(self, state: Hashable, symbol: str) -> Hashable | None:
        """The state after a symbol; None where no number goes on so."""
        ...

    def tail(self, state: Hashable) -> Tail | None:
        """The text with which a number can end in a state; None where no number ends."""
        ...

    @property
    def symbols(self) -> str: ...


class _Builder:
    """Builds minimal automata. All automata of one builder share their states and its limits."""

    def __init__(self) -> None:
        self.states: list[DigitState] = []
        self._ids: dict[DigitState, int] = {}
        self._explored = 0

    def build(self, machine: Machine) -> int | None:
        """The first state; None where the language is empty. Raises ``TooLarge``."""
        return self._built(machine, machine.start(), {})

    def _built(
        self, machine: Machine, state: Hashable, known: dict[Hashable, int | None]
    ) -> int | None:
        if state in known:
            return known[state]
        self._explored += 1
        if self._explored > MAX_EXPLORED:
            raise TooLarge
        by_target: dict[int, str] = {}
        for symbol in machine.symbols:
            after = machine.step(state, symbol)
            target = None if after is None else self._built(machine, after, known)
            if target is not None:
                by_target[target] = by_target.get(target, "") + symbol
        found = DigitState(machine.tail(state), tuple((s, t) for t, s in by_target.items()))
        known[state] = self._known(found)
        return known[state]

    def _known(self, state: DigitState) -> int | None:
        if state.tail is None and not state.edges:
            return None
        if state not in self._ids:
            if len(self.states) >= MAX_STATES:
                raise TooLarge
            self._ids[state] = len(self.states)
            self.states.append(state)
        return self._ids[state]


def signed(unsigned: Machine | None, negative: Machine | None) -> Digits | None:
    """Magnitudes without a sign, and others with one; None where there are none. Raises
    ``TooLarge``."""
    builder = _Builder()
    plain = None if unsigned is None else builder.build(unsigned)
    minus = None if negative is None else builder.build(negative)
    if plain is None and minus is None:
        return None
    return Digits(tuple(builder.states), plain, minus)


def finite(texts: Iterable[str]) -> Digits | None:
    """Finitely many numbers, as they are written. Raises ``TooLarge``."""
    return signed(_Texts(tuple(texts)), None)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Finitely many texts, as a machine whose states are what is left of each."""

    texts: tuple[str, ...]

    @property
    def symbols(self) -> str:
        return "".join(sorted(set().union(*self.texts)))

    def start(self) -> Hashable:
        return frozenset(self.texts)

    def step(self, state: Hashable, symbol: str) -> Hashable | None:
        assert isinstance(state, frozenset)
        return frozenset(text[1:] for text in state if text.startswith(symbol)) or None

    def tail(self, state: Hashable) -> Tail | None:
        assert isinstance(state, frozenset)
        return Tail.NOTHING if "" in state else None
