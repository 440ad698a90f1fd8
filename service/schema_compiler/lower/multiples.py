"""Multiples of decimals, as the smallest automaton over the characters of a magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from service.schema_compiler.lower.digit_automata import DIGITS, TooLarge
from service.schema_compiler.regex.dfa import DEAD, Dfa, minimal

_MAX_RAW = 3_000
"""States before they are merged."""


_SYMBOLS = "." + DIGITS
_BLOCKS = tuple(((ord(symbol), ord(symbol)),) for symbol in _SYMBOLS)


@dataclass(frozen=True, slots=True)
class Multiples:
    """States are numbers, the first is 0. moves: by state, where characters lead; none that leads
    nowhere. ends: states in which a magnitude may end."""

    moves: tuple[dict[str, int], ...]
    ends: frozenset[int]


@lru_cache(maxsize=128)
def multiples(modulus: int, places: int, negated: bool) -> Multiples:
    """Of magnitudes that are multiples of ``modulus / 10**places``, or with ``negated`` are none.
    Raises ``TooLarge``."""
    if modulus * (places + 2) > _MAX_RAW:
        raise TooLarge
    moves, multiple = _remainders(modulus, places)
    edges = (tuple(by_symbol.get(symbol, DEAD) for symbol in _SYMBOLS) for by_symbol in moves)
    accepting = tuple(found != negated for found in multiple)
    found = minimal(Dfa(_BLOCKS, tuple(edges), accepting))
    merged = (
        {symbol: target for symbol, target in zip(_SYMBOLS, row, strict=True) if target != DEAD}
        for row in found.edges
    )
    return Multiples(tuple(merged), frozenset(s for s, end in enumerate(found.accepting) if end))


def _remainders(modulus: int, places: int) -> tuple[list[dict[str, int]], list[bool]]:
    """Moves, and which states are multiples: remainders before the point (state = remainder), then
    after each place; at last what has a digit beyond the places that is not zero."""
    beyond = modulus * (places + 2)
    moves: list[dict[str, int]] = []
    multiple: list[bool] = []
    for phase in range(places + 2):
        place = max(0, phase - 1)
        for rest in range(modulus):
            multiple.append(rest * 10 ** (places - place) % modulus == 0)
            if phase == places + 1:
                moves.append(dict.fromkeys(DIGITS, beyond) | {"0": len(moves)})
                continue
            base = modulus * (phase + 1 if phase else 0)
            by_digit = {d: base + (10 * rest + int(d)) % modulus for d in DIGITS}
            moves.append(by_digit if phase else by_digit | {".": modulus + rest})
    moves.append(dict.fromkeys(DIGITS, beyond))
    multiple.append(False)
    return moves, multiple
