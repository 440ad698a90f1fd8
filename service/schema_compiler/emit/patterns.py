"""Automata and simple expressions as rules of EBNF.

An automaton becomes one rule for each state, each of which begins with a character and goes on with
one other rule. In such a grammar a text has one reading at most, so matching takes the same small
time for every byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from service.schema_compiler.emit.json_escapes import JsonEscapes, RawText
from service.schema_compiler.emit.rules import Rules, any_or_end, one_of, sequence
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import ALL, Ranges, ranges
from service.schema_compiler.regex.dfa import DEAD, Dfa
from service.schema_compiler.regex.expressions import is_anything
from service.schema_compiler.regex.syntax import Chars, Choice, Node, Repeat, Sequence

Escapes = RawText | JsonEscapes
MANY_RANGES = 32
"""Of a class that gets a rule of its own where it is repeated: compilers write repeats out."""


def automaton(dfa: Dfa, rules: Rules, escapes: Escapes) -> str:
    """The expression for the texts of a minimal automaton that accepts something, and their end."""
    return _Automaton(dfa, rules, escapes).expression()


class _Automaton:
    def __init__(self, dfa: Dfa, rules: Rules, escapes: Escapes) -> None:
        self._rules, self._escapes = rules, escapes
        self._accepting = dfa.accepting
        self._arrows = [_arrows(dfa.blocks, row) for row in dfa.edges]
        arriving = [0] * len(dfa.edges)
        arriving[0] = 2
        for arrows in self._arrows:
            for target in arrows:
                arriving[target] += 1
        self._inline = [
            count == 1 and len(arrows) + accepting == 1
            for count, arrows, accepting in zip(arriving, self._arrows, dfa.accepting, strict=True)
        ]
        self._names: dict[int, str] = {}

    def expression(self) -> str:
        order = self._reach()
        for state in order:
            self._rules.fill(self._names[state], " | ".join(self._alternatives(state)))
        return self._name(0)

    def _reach(self) -> list[int]:
        """The states that get rules of their own, which are reserved."""
        order = []
        for state in range(len(self._arrows)):
            if not self._inline[state] and not self._is_anything(state):
                self._names[state] = self._rules.reserve(f"{self._escapes.name}_text")
                order.append(state)
        return order

    def _name(self, state: int) -> str:
        return self._names.get(state) or self._escapes.anything()

    def _is_anything(self, state: int) -> bool:
        return self._accepting[state] and self._arrows[state] == {state: ALL}

    def _alternatives(self, state: int) -> list[str]:
        found = [self._escapes.end] if self._accepting[state] else []
        for target, characters in self._arrows[state].items():
            text, at = "", target
            single = _single(characters)
            heads = [""] if single else self._escapes.alternatives(characters)
            text += single
            tail: list[str] = []
            while self._inline[at]:
                if self._accepting[at]:
                    break
                ((following, more),) = self._arrows[at].items()
                if single := _single(more):
                    text += single
                else:
                    if text:
                        tail.append(self._escapes.text(text))
                        text = ""
                    tail.append(self._one(more))
                at = following
            if text:
                tail.append(self._escapes.text(text))
            tail.append(self._escapes.end if self._inline[at] else self._name(at))
            found += [" ".join(filter(None, (head, *tail))) for head in heads]
        return found

    def _one(self, characters: Ranges) -> str:
        return one_character(characters, self._rules, self._escapes)


def _arrows(blocks: tuple[Ranges, ...], row: Items[int]) -> dict[int, Ranges]:
    """The characters that lead to each next state."""
    found: dict[int, list[tuple[int, int]]] = {}
    for block, target in zip(blocks, row, strict=True):
        if target != DEAD:
            found.setdefault(target, []).extend(block)
    return {target: ranges(pairs) for target, pairs in found.items()}


def _single(characters: Ranges) -> str:
    """The character of a set of one, else nothing."""
    (low, high), *more = characters
    return chr(low) if low == high and not more else ""


def one_character(characters: Ranges, rules: Rules, escapes: Escapes) -> str:
    """The expression for one character of a set that is not empty."""
    alternatives = escapes.alternatives(characters)
    return (
        alternatives[0]
        if len(alternatives) == 1 and " " not in alternatives[0]
        else rules.define(f"{escapes.name}_character", " | ".join(alternatives))
    )


def _repeated(characters: Ranges, rules: Rules, escapes: Escapes) -> str:
    one = one_character(characters, rules, escapes)
    if len(characters) <= MANY_RANGES or not one.startswith("["):
        return one
    return rules.define(f"{escapes.name}_character", one)


def _times(one: str, low: int, high: int | None) -> str:
    """An expression in one piece, low to high times."""
    if high is None:
        return (f"{one}*", f"{one} {one}*")[low] if low < 2 else f"{one}{{{low},}}"
    if high == 0:
        return '""'
    if (low, high) in ((0, 1), (1, 1)):
        return one if low else f"{one}?"
    return f"{one}{{{low},{high}}}"


def expression(node: Node, rules: Rules, escapes: Escapes) -> str:
    """The expression for the texts that a regular expression without assertions matches from end to
    end, and their end."""
    items = list(node.items) if isinstance(node, Sequence) else [node]
    if items and is_anything(items[-1]):
        return " ".join((*_written(items[:-1], rules, escapes), escapes.anything()))
    return " ".join((*_written(items, rules, escapes), escapes.end))


def body_of(node: Node, rules: Rules, escapes: Escapes) -> str:
    """The body of a rule for the texts of a regular expression, without their end."""
    items = node.items if isinstance(node, Choice) else (node,)
    return " | ".join(_item(item, rules, escapes) for item in items)


def _written(items: Iterable[Node], rules: Rules, escapes: Escapes) -> list[str]:
    """The items one after the other; single characters together as text."""
    found, text = [], ""
    for item in items:
        single = _single(resolve(item)) if isinstance(item, Chars) else ""
        text += single
        if not single:
            found += [escapes.text(text)] if text else []
            text = ""
            found.append(_item(item, rules, escapes))
    return [*found, escapes.text(text)] if text else found


def _item(node: Node, rules: Rules, escapes: Escapes) -> str:
    if isinstance(node, Chars):
        return one_character(resolve(node), rules, escapes)
    if isinstance(node, Repeat):
        if is_chained(node, escapes):
            return _chain(node, rules, escapes)
        return _times(_piece(node.item, rules, escapes), node.low, node.high)
    if isinstance(node, Choice):
        return one_of(_item(item, rules, escapes) for item in node.items)
    assert isinstance(node, Sequence)
    return " ".join(_written(node.items, rules, escapes)) or '""'


def is_chained(node: Repeat, escapes: Escapes) -> bool:
    """Whether a repeat is of characters that are spelled in several ways.

    It gets a rule for each number that is left, or one that goes on with itself. With one rule for
    a character, repeated, a matcher would follow each token of several characters out of it, at
    each step: a tenth of a second where there are 150,000.
    """
    if not isinstance(node.item, Chars) or (node.low, node.high) in ((0, 1), (1, 1), (0, 0)):
        return False
    characters = resolve(node.item)
    return len(characters) <= MANY_RANGES and len(escapes.alternatives(characters)) > 1


def _chain(node: Repeat, rules: Rules, escapes: Escapes) -> str:
    assert isinstance(node.item, Chars)
    ways = escapes.alternatives(resolve(node.item))
    rest = ""
    if node.high is None:
        rest = rules.once(("any number", *ways), lambda: _any_number(ways, rules))
    return counted(ways, node.low, node.high, '""', rest, rules)


def _any_number(ways: Items[str], rules: Rules) -> str:
    name = rules.reserve("characters")
    rules.fill(name, any_or_end([f"{way} {name}" for way in ways], ends=True))
    return name


def counted(ways: Items[str], low: int, high: int | None, end: str, rest: str, rules: Rules) -> str:
    """The expression for low to high characters and an end: a rule for each number that is left.

    ways: to write a character. rest: any number of them and the end.
    """
    if high == 0:
        return end
    if low == 0 and high is None:
        return rest

    def make() -> str:
        fewer = None if high is None else high - 1
        below = counted(ways, max(low - 1, 0), fewer, end, rest, rules)
        parts = [sequence(way, below) for way in ways]
        return rules.define("counted", " | ".join(parts if low else [end, *parts]))

    return rules.once(("counted", tuple(ways), low, high, end), make)


def _piece(node: Node, rules: Rules, escapes: Escapes) -> str:
    """The item as something that can be repeated."""
    if isinstance(node, Chars):
        return _repeated(resolve(node), rules, escapes)
    return rules.define(f"{escapes.name}_part", _item(node, rules, escapes))
