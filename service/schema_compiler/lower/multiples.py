"""Multiples of decimals, as the smallest automaton over the characters of a magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from service.schema_compiler.lower.digit_automata import DIGITS, TooLarge

_MAX_RAW = 3_000
"""States before they are merged."""


@dataclass(frozen=True, slots=True)
class Multiples:
    """States are numbers, the first is ``start``. moves: by state, where characters lead; none that
    leads nowhere. ends: states in which a magnitude may end."""

    start: int
    moves: tuple[dict[str, int], ...]
    ends: frozenset[int]


@lru_cache(maxsize=128)
def multiples(modulus: int, places: int, negated: bool) -> Multiples:
    """Of magnitudes that are multiples of ``modulus / 10**places``, or with ``negated`` are none.
    Raises ``TooLarge``."""
    if modulus * (places + 2) > _MAX_RAW:
        raise TooLarge
    moves, multiple = _remainders(modulus, places)
    ends = [found != negated for found in multiple]
    classes = _merged(moves, ends)
    count = max(classes) + 1
    merged: list[dict[str, int]] = [{} for _ in range(count)]
    for state, by_symbol in enumerate(moves):
        for symbol, target in by_symbol.items():
            merged[classes[state]][symbol] = classes[target]
    final = frozenset(classes[state] for state, end in enumerate(ends) if end)
    alive = _alive(merged, final)
    pruned = tuple({s: t for s, t in by_symbol.items() if t in alive} for by_symbol in merged)
    return Multiples(classes[0], pruned, final)


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


def _merged(moves: list[dict[str, int]], ends: list[bool]) -> list[int]:
    """Equivalent states as equal numbers, by refining a partition until it stays."""
    classes = [int(end) for end in ends]
    count = 0
    while True:
        known: dict[tuple[object, ...], int] = {}
        refined = []
        for state, by_symbol in enumerate(moves):
            key = (classes[state], "." in by_symbol, *(classes[t] for t in by_symbol.values()))
            refined.append(known.setdefault(key, len(known)))
        if len(known) == count:
            return refined
        count, classes = len(known), refined


def _alive(moves: list[dict[str, int]], ends: frozenset[int]) -> set[int]:
    """States from which an end can be reached."""
    alive, before = set(ends), -1
    while len(alive) != before:
        before = len(alive)
        alive |= {s for s, by_symbol in enumerate(moves) if alive.intersection(by_symbol.values())}
    return alive
