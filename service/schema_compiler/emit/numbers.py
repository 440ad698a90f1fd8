"""Sets of numbers as EBNF."""

from __future__ import annotations

import itertools
from collections import Counter

from service.schema_compiler.emit.rules import Rules, literal, one_of
from service.schema_compiler.ir.values import (
    AnyNumber,
    Digits,
    NumberSet,
    Scientific,
    Suffix,
    Tail,
    WithSuffix,
    Zero,
)

_MAX_DIGITS = 39
"""Digits of a number that an automaton does not read."""
_EXPONENT = '([eE] [+-]? ([0-9]{1,2} | "1" [0-9]{2}))?'
_SMALL = '[1-9] ("." {fraction})? [eE] "-" ("0" [5-9] | [1-9] [0-9])'
_LARGE = '[1-9] ("." {fraction})? [eE] "+"? ("1" [6-9] | [2-9] [0-9] | "1" [0-9] [0-9])'


def number(numbers: NumberSet, rules: Rules) -> str:
    """The expression for the numbers of a set."""
    if isinstance(numbers, Digits):
        return _digits(numbers, rules)
    if isinstance(numbers, AnyNumber):
        return one_of(number(one, rules) for one in numbers.sets)
    if isinstance(numbers, Scientific):
        hint, body = ("small", _SMALL) if numbers.small else ("large", _LARGE)
        sign = '"-" ' if numbers.negative else ""
        return sign + rules.define(hint, body.format(fraction=_fraction(rules)))
    if isinstance(numbers, Zero):
        return '"0"'
    return _with_suffix(numbers, rules)


def _with_suffix(numbers: WithSuffix, rules: Rules) -> str:
    inner = number(numbers.numbers, rules)
    if numbers.suffix is Suffix.EXPONENT:
        return f"({inner} {rules.define('exponent', _EXPONENT)})"
    if numbers.suffix is Suffix.ZERO_FRACTION:
        return f'{inner} "." [0]{{1,6}}'
    return f"{inner} {literal('0' * numbers.suffix)}"


def _fraction(rules: Rules) -> str:
    return rules.define("fraction", f"[0-9] {_some_digits(rules)}")


def _some_digits(rules: Rules) -> str:
    """The rule for up to ``_MAX_DIGITS`` digits, by fours: a repeat would be a rule for each digit."""
    return rules.once("some digits", lambda: _by_fours(rules))


def _by_fours(rules: Rules) -> str:
    three = rules.define("three_digits", "[0-9] [0-9] [0-9]")
    # A rule that refers to another one is not copied into the rules that begin with it.
    four = rules.define("four_digits", f"[0-9] {three}")
    up_to = rules.define("few_digits", '"" | [0-9] | [0-9] [0-9] | [0-9] [0-9] [0-9]')
    few = up_to
    for _ in range(_MAX_DIGITS // 4):
        up_to = rules.define("some_digits", f"{few} | {four} {up_to}")
    return up_to


def _digits(digits: Digits, rules: Rules) -> str:
    writer = _Writer(digits, rules)
    parts = [] if digits.unsigned is None else [writer.write(digits.unsigned)]
    if digits.negative is not None and digits.negative == digits.unsigned:
        return f'"-"? {parts[0]}'
    if digits.negative is not None:
        parts.append(f'"-" {writer.write(digits.negative)}')
    return one_of(parts)


class _Writer:
    """Writes states as expressions; a state to which several lead becomes a rule."""

    def __init__(self, digits: Digits, rules: Rules) -> None:
        self._states = digits.states
        self._rules = rules
        self._uses = Counter(target for state in digits.states for _, target in state.edges)
        self._written: dict[int, str] = {}

    def write(self, state: int) -> str:
        """The expression for what may follow in a state; empty for nothing."""
        if state not in self._written:
            run = self._run(state)
            self._written[state] = self._branches(state) if run is None else run
        return self._written[state]

    def _branches(self, number: int) -> str:
        state = self._states[number]
        parts = [f"{_class(symbols)} {self.write(target)}" for symbols, target in state.edges]
        if state.tail is not None:
            parts.append(self._tail(state.tail))
        parts = [part.rstrip() for part in parts]
        if len(parts) == 1:
            return parts[0]
        body = " | ".join(parts)
        return f"({body})" if self._uses[number] < 2 else self._rules.define("digits", body)

    def _tail(self, tail: Tail) -> str:
        if tail is Tail.NOTHING:
            return '""'
        if tail is Tail.DIGITS:
            return _some_digits(self._rules)
        fraction = _fraction(self._rules)
        if tail is Tail.DIGITS_AND_FRACTION:
            return self._rules.define("more", f'{_some_digits(self._rules)} ("." {fraction})?')
        if tail is Tail.FRACTION:
            return fraction
        return self._rules.define("more", f"{fraction}?")

    def _run(self, number: int) -> str | None:
        """The expression where up to so many of the same characters may follow, and nothing else."""
        symbols = ""
        for count in itertools.count():
            state = self._states[number]
            if state.tail is not Tail.NOTHING:
                return None
            if not state.edges:
                return f"{_set(symbols)}{{0,{count}}}" if count else ""
            if len(state.edges) > 1 or (symbols and state.edges[0][0] != symbols):
                return None
            symbols, number = state.edges[0]
        return None


def _class(symbols: str) -> str:
    return literal(symbols) if len(symbols) == 1 else _set(symbols)


def _set(symbols: str) -> str:
    parts, at = "", 0
    while at < len(symbols):
        end = at
        while end + 1 < len(symbols) and ord(symbols[end + 1]) == ord(symbols[end]) + 1:
            end += 1
        parts += symbols[at] if end == at else f"{symbols[at]}-{symbols[end]}"
        at = end + 1
    return f"[{parts}]"
