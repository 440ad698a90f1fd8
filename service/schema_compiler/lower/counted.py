"""Finite automata over the characters of numbers, written as rules.

They have no cycles, since the digits of a number are counted, so building them from their ends makes
them as small as they can be.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

from service.schema_compiler.emit.rules import Rules, literal, one_of

MAX_STATES = 3_000
"""States that are looked at for one automaton."""
MAX_NODES = 400
"""States of an automaton that is written down."""
DIGITS = "0123456789"


class TooLarge(Exception):
    """The automaton has too many states."""


class Machine(Protocol):
    """An automaton by its rules; states are whatever it says they are."""

    def start(self) -> Hashable: ...

    def step(self, state: Hashable, symbol: str) -> Hashable | None:
        """The state after a symbol; None where no number goes on so."""
        ...

    def final(self, state: Hashable) -> str | None:
        """The expression for the rest of a number that is complete but for it (empty: nothing);
        None where no number ends."""
        ...

    @property
    def symbols(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Node:
    """A state, equal to another exactly if it is the same. edges: symbols and where they lead."""

    final: str | None
    edges: tuple[tuple[str, int], ...]


class _Builder:
    """Makes automata into nodes. One builder looks at no more than ``MAX_STATES`` states."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._ids: dict[Node, int] = {}
        self._states = 0

    def build(self, machine: Machine) -> int | None:
        """The first node; None where the language is empty. Raises ``TooLarge``."""
        return self._built(machine, machine.start(), {})

    def _built(
        self, machine: Machine, state: Hashable, known: dict[Hashable, int | None]
    ) -> int | None:
        if state in known:
            return known[state]
        self._states += 1
        if self._states > MAX_STATES:
            raise TooLarge
        by_target: dict[int, str] = {}
        for symbol in machine.symbols:
            after = machine.step(state, symbol)
            target = None if after is None else self._built(machine, after, known)
            if target is not None:
                by_target[target] = by_target.get(target, "") + symbol
        node = Node(machine.final(state), tuple((s, t) for t, s in by_target.items()))
        known[state] = self._known(node)
        return known[state]

    def _known(self, node: Node) -> int | None:
        if node.final is None and not node.edges:
            return None
        if node not in self._ids:
            if len(self.nodes) >= MAX_NODES:
                raise TooLarge
            self._ids[node] = len(self.nodes)
            self.nodes.append(node)
        return self._ids[node]


class _Writer:
    """Writes nodes as expressions; what several lead to is a rule."""

    def __init__(self, nodes: list[Node], rules: Rules) -> None:
        self._nodes = nodes
        self._rules = rules
        self._uses = Counter(target for node in nodes for _, target in node.edges)
        self._written: dict[int, str] = {}

    def write(self, number: int) -> str:
        """The expression for what may follow in a state; empty for nothing."""
        if number not in self._written:
            run = self._run(number)
            self._written[number] = self._branches(number) if run is None else run
        return self._written[number]

    def _branches(self, number: int) -> str:
        node = self._nodes[number]
        parts = [f"{_class(symbols)} {self.write(target)}" for symbols, target in node.edges]
        if node.final is not None:
            parts.append(self._rest(node.final))
        parts = [part.rstrip() for part in parts]
        if len(parts) == 1:
            return parts[0]
        body = " | ".join(parts)
        return f"({body})" if self._uses[number] < 2 else self._rules.define("digits", body)

    def _rest(self, final: str) -> str:
        """What is no more than a rule and a mark stands as it is."""
        short = not final or final.rstrip("?").isidentifier()
        return (final or '""') if short else self._rules.define("more", final)

    def _run(self, number: int) -> str | None:
        """The expression where up to so many of the same characters may follow, and nothing else."""
        symbols = ""
        for count in itertools.count():
            node = self._nodes[number]
            if node.final != "":
                return None
            if not node.edges:
                return f"{_set(symbols)}{{0,{count}}}" if count else ""
            if len(node.edges) > 1 or (symbols and node.edges[0][0] != symbols):
                return None
            symbols, number = node.edges[0]
        return None


def signed_expression(
    positive: Machine | None, negative: Machine | None, rules: Rules
) -> str | None:
    """The expression for magnitudes without a sign and others with one, none of them twice; None
    where there are none. Raises ``TooLarge``."""
    builder = _Builder()
    plain = None if positive is None else builder.build(positive)
    minus = None if negative is None else builder.build(negative)
    writer = _Writer(builder.nodes, rules)
    parts = [] if plain is None else [writer.write(plain)]
    if minus is not None and minus == plain:
        return f'"-"? {parts[0]}'
    if minus is not None:
        parts.append(f'"-" {writer.write(minus)}')
    return one_of(parts) if parts else None


def texts_expression(texts: Iterable[str], rules: Rules) -> str | None:
    """The expression for one of finitely many numbers. Raises ``TooLarge``."""
    return signed_expression(_Texts(tuple(texts)), None, rules)


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

    def final(self, state: Hashable) -> str | None:
        assert isinstance(state, frozenset)
        return "" if "" in state else None
