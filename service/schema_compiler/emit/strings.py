"""Sets of strings as EBNF: JSON strings, and texts without quotes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

from service.schema_compiler.emit import patterns
from service.schema_compiler.emit.json_escapes import JsonEscapes, RawText
from service.schema_compiler.emit.patterns import counted
from service.schema_compiler.emit.regular_expressions import regular_expression
from service.schema_compiler.emit.rules import Rules, literal
from service.schema_compiler.ir.values import (
    AcceptedText,
    AnyText,
    ExpressionText,
    MatchedText,
    OtherText,
    PrefixedText,
    TextSet,
)
from service.schema_compiler.regex.codepoints import ALL, Ranges, ranges

_QUOTE = literal('"')
NO_CHARACTERS: frozenset[str] = frozenset()


def string(
    texts: TextSet, rules: Rules, *, name: bool = False, told_apart: frozenset[str] = NO_CHARACTERS
) -> str:
    """The expression for JSON strings, quotes included.

    name: names of properties, in which characters are in their canonical form until no declared name can
    be meant any more; values may use any escape of JSON. told_apart: characters of all texts that are
    excluded somewhere in the grammar, so that rules for all other characters are shared.
    """
    return f"{_QUOTE} {_rest(texts, rules, name, told_apart)}"


def excluded_characters(texts: TextSet) -> set[str]:
    """The characters of the texts that a set excludes."""
    if isinstance(texts, PrefixedText):
        return excluded_characters(texts.rest)
    if isinstance(texts, OtherText):
        return set().union(*texts.texts, *texts.prefixes)
    return set()


def raw_text(texts: TextSet, rules: Rules) -> str:
    """The expression for texts as they are: all texts, or those of one expression or automaton."""
    escapes = RawText(rules)
    if isinstance(texts, AcceptedText):
        return patterns.automaton(texts.automaton, rules, escapes)
    if isinstance(texts, MatchedText):
        return patterns.expression(texts.expression, rules, escapes)
    assert texts == AnyText()
    return escapes.anything()


def _rest(texts: TextSet, rules: Rules, name: bool, told_apart: frozenset[str]) -> str:
    """What comes after the first quote."""
    escapes = JsonEscapes(rules)
    if isinstance(texts, AcceptedText):
        return patterns.automaton(texts.automaton, rules, escapes)
    if isinstance(texts, MatchedText):
        return patterns.expression(texts.expression, rules, escapes)
    if isinstance(texts, PrefixedText):
        return f"{escapes.text(texts.prefix)} {_rest(texts.rest, rules, name, told_apart)}"
    if isinstance(texts, ExpressionText):
        return regular_expression(rules, may_be_empty=texts.may_be_empty)
    if isinstance(texts, AnyText):
        if name:
            return canonical(texts.minimum, texts.maximum, rules, told_apart)
        return in_any_form(texts.minimum, texts.maximum, rules)
    found = anything_but(
        texts.texts, texts.minimum, texts.maximum, rules, texts.prefixes, told_apart
    )
    assert found is not None, "values without a text are pruned before"
    return found


# Any characters


def canonical(
    low: int, high: int | None, rules: Rules, told_apart: frozenset[str] = NO_CHARACTERS
) -> str:
    """From behind the first quote: low to high characters, those that are counted or can be told apart
    as ``json.dumps`` writes them."""
    escapes = JsonEscapes(rules)
    rest = escapes.anything()
    if (low, high) == (1, None):
        told = sorted(told_apart)
        middle = len(told) // 2
        halves = filter(None, (told[:middle], told[middle:]))
        ways = [_block(tuple(one), rest, rules) for one in halves]
        ways.append(escapes.others(_ranges_of(told_apart), rest))
        return rules.define("json_some", " | ".join(ways))
    return counted(escapes.alternatives(ALL), low, high, JsonEscapes.end, rest, rules)


def in_any_form(low: int, high: int | None, rules: Rules) -> str:
    """The same in any form of JSON."""
    escapes = JsonEscapes(rules)
    return counted(escapes.any_form_of_one(), low, high, JsonEscapes.end, escapes.anything(), rules)


# All but some


_Tree = dict[str, "_Tree | None"]
"""By character; None where no text may go on with it, as it would begin with a name."""
_END = ""
"""The key of a node at which a name ends."""


def anything_but(
    names: Iterable[str],
    low: int,
    high: int | None,
    rules: Rules,
    beginnings: Iterable[str] = (),
    told_apart: frozenset[str] = NO_CHARACTERS,
) -> str | None:
    """The expression for a JSON string behind its first quote, of low to high characters, that is none
    of the names and begins with none of the beginnings, which are not empty; None if there is none.

    told_apart: see `string`.
    There may be thousands of names, so their tree is written as it is: in each node, a character that
    goes on with no name leaves the tree, and anything may follow."""
    names, beginnings = list(names), list(beginnings)
    told_apart = told_apart.union(*names, *beginnings)
    tree: _Tree = {}
    for beginning in sorted(beginnings):  # a set has another order in each process
        node = _node_at(tree, beginning[:-1])
        if node is not None:
            node[beginning[-1]] = None
    for name in sorted(names):
        node = _node_at(tree, name)
        if node is not None:
            node[_END] = {}
    return _TreeWriter(low, high, rules, told_apart).write(tree)


def _node_at(tree: _Tree, path: str) -> _Tree | None:
    """The node of a path, made where there is none; None where the path begins with a beginning."""
    node: _Tree | None = tree
    for character in path:
        if node is None:
            break
        node = node.setdefault(character, {})
    return node


_Ways = list[tuple[str, str]]
"""The alternatives of a node: characters, and the expression of what follows them."""
_MOST_WAYS = 5
"""Alternatives up to which a node is written in the rule of the node before it. With more, compilers
take longer for them than for another rule."""


class _TreeWriter:
    def __init__(
        self, low: int, high: int | None, rules: Rules, told_apart: frozenset[str]
    ) -> None:
        self._low, self._high, self._rules = low, high, rules
        self._told_apart = told_apart
        self._in_order = sorted(told_apart)
        self._every = _ranges_of(told_apart)
        self._most = math.inf if high is None else high
        self._escapes = JsonEscapes(rules)
        self._leaving: dict[tuple[frozenset[str], str | None, bool], str | None] = {}

    def write(self, tree: _Tree) -> str | None:
        """The expression of a tree; its nodes from the leaves up, so that equal ones are one rule."""
        made: dict[int, _Ways] = {}
        for node, depth in _bottom_up(tree):
            made[id(node)] = self._node(node, depth, made)
        return self._rule(made[id(tree)])

    def _node(self, node: _Tree, depth: int, made: dict[int, _Ways]) -> _Ways:
        goes_on = [character for character in node if character != _END]
        ends = len(goes_on) == len(node) and self._low <= depth <= self._most
        leaves = self._leaves(frozenset(goes_on), self._rest(depth + 1), ends)
        ways: _Ways = [] if leaves is None else [("", leaves)]
        for character in goes_on:
            child = node[character]
            below = [] if child is None else made[id(child)]
            if len(ways) + len(below) > _MOST_WAYS:
                rule = self._rule(below)
                below = [] if rule is None else [("", rule)]
            ways += [(character + path, rest) for path, rest in below]
        return ways

    def _rule(self, ways: _Ways) -> str | None:
        """The expression of a node; None where it has no text."""
        if not ways:
            return None
        if len(ways) == 1 and not ways[0][0]:
            return ways[0][1]
        parts = [f"{self._escapes.text(path)} {rest}" if path else rest for path, rest in ways]
        return self._rules.define("json_other", " | ".join(parts))

    def _leaves(self, goes_on: frozenset[str], rest: str | None, ends: bool) -> str | None:
        """The rule for any other character and the rest, or with ``ends`` the end; None for none of
        both. What it takes to compile grows with rules and with the characters that a state takes, so
        that nodes that go on alike share one, and characters that no name has are in a rule for all."""
        key = goes_on, rest, ends
        if key not in self._leaving:
            parts = [self._escapes.end] if ends else []
            if rest is not None:
                parts += self._blocks(goes_on, rest)
                parts.append(self._escapes.others(self._every, rest))
            body = " | ".join(parts)
            self._leaving[key] = self._rules.define("json_leaves", body) if parts else None
        return self._leaving[key]

    def _blocks(self, but: frozenset[str], rest: str) -> list[str]:
        """Expressions for any of the characters of all excluded names but some, and the rest. Each is a
        rule for a block of these characters, so that hardly any set of them is a new state."""
        found, pending = [], [self._in_order]
        while pending:
            block = pending.pop()
            inside = [one for one in block if one not in but]
            if inside == block and block:
                found.append(_block(tuple(block), rest, self._rules))
            elif inside:
                middle = len(block) // 2
                pending += [block[:middle], block[middle:]]
        return found

    def _rest(self, depth: int) -> str | None:
        """Any characters from a depth on."""
        low = max(self._low - depth, 0)
        if not low and self._high is None:
            return self._escapes.anything()
        high = None if self._high is None else self._high - depth
        if high is not None and high < 0:
            return None
        return canonical(low, high, self._rules, self._told_apart)


def _block(block: tuple[str, ...], rest: str, rules: Rules) -> str:
    """The rule for one of the characters and the rest."""

    def make() -> str:
        ways = JsonEscapes(rules).among(block)
        return rules.define("json_block", " | ".join(f"{one} {rest}" for one in ways))

    return rules.once(("block", block, rest), make)


@lru_cache(maxsize=1024)
def _ranges_of(characters: frozenset[str]) -> Ranges:
    return ranges((ord(character), ord(character)) for character in characters)


def _bottom_up(tree: _Tree) -> Iterator[tuple[_Tree, int]]:
    order, pending = [], [(tree, 0)]
    while pending:
        node, depth = pending.pop()
        order.append((node, depth))
        pending += [
            (below, depth + 1)
            for character, below in node.items()
            if character != _END and below is not None
        ]
    return reversed(order)
