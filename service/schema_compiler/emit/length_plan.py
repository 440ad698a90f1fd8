"""The lengths of strings as a table for decoders, which count beside the grammar.

The states of the table are the positions that a reader of an answer can tell apart: it knows the names
and indices on the way from the root, and no more. Several values of the document can meet at one
position. A string is then limited by the widest bounds there, and strings with tighter bounds are
reported: the grammar has to count those.

The table is a sequence of 32-bit integers, little-endian:

    header   FORMAT, numbers of states, nodes, edges and items, the state of the root, and how many
             characters fit at the beginning of each string and name
    states   minimum, maximum, first node of the text or NONE, reserve, maximum of names, first node of the
             names or NONE, state of other names, first item, number of items, state of further items;
             each of them for strings, objects and arrays at the position
    nodes    first edge, number of edges, state of the name that ends here or NONE, characters that a
             text needs at least to come to an end
    edges    first byte, node or NONE; sorted by byte, each up to the next one of its node
    items    states

In state 0 nothing is limited. The nodes of a text are there where a pattern does not let it end
everywhere; its reserve is the most characters that it can need. A declared name is written as
``json.dumps(name, ensure_ascii=False)`` does, as the grammar has it, without its quotes.
``lmdeploy_ext.lengths`` reads the table.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from service.schema_compiler.emit.string_lengths import Bounds, Position, string_lengths
from service.schema_compiler.emit.text_nodes import (
    MAX_EDGES,
    NONE,
    TooManyEdges,
    byte_spans,
    text_nodes,
)
from service.schema_compiler.ir.values import (
    AcceptedText,
    Alternative,
    AnyText,
    Document,
    Object,
    OtherText,
    Reference,
    String,
    references,
)
from service.schema_compiler.regex.dfa import Dfa

FORMAT = 2
UNLIMITED = 2**31 - 1
"""The maximum of strings without one. No answer has so many characters."""
MAX_STATES = 2_000
MAX_NODES = 100_000

Part = Reference | str
"""What can be at a position: a value of the document, or a constant array or object as JSON."""
T = TypeVar("T")
_FREE: frozenset[Part] = frozenset()


@dataclass(frozen=True, slots=True)
class LengthPlan:
    """table: for decoders; empty where nothing is limited. looser: JSON pointers of the keywords whose
    bounds are tighter than those of the table at some position."""

    table: bytes
    looser: frozenset[str]


def length_plan(document: Document) -> LengthPlan | None:
    """The limits of the strings that the grammar of a document does not count; None if the table were
    too large."""
    limited = _limited(document)
    if document.root not in limited:
        return LengthPlan(b"", frozenset())
    try:
        return _Writer(document, limited).run()
    except _TooLarge:
        return None


class _TooLarge(Exception):
    """The table has too many states or names."""


class _Writer:
    def __init__(self, document: Document, limited: set[Reference]) -> None:
        self._document, self._limited = document, limited
        self._positions = string_lengths(document).positions
        self._states: dict[frozenset[Part], int] = {_FREE: 0}
        self._pending: list[frozenset[Part]] = []
        self._nodes: list[list[int]] = []
        self._texts: dict[Dfa, tuple[int, int] | None] = {}
        self._room = MAX_EDGES
        self._edges: list[tuple[int, int]] = []
        self._items: list[int] = []
        self._looser: set[str] = set()

    def run(self) -> LengthPlan:
        rows: list[tuple[int, ...]] = [(0, UNLIMITED, NONE, 0, UNLIMITED, NONE, 0, 0, 0, 0)]
        root = self._state([self._document.root])
        while len(rows) <= len(self._pending):
            rows.append(self._row(self._pending[len(rows) - 1]))
        least = min(min(row[1] - row[3], row[4]) for row in rows)
        sizes = (len(rows), len(self._nodes), len(self._edges), len(self._items))
        numbers = [FORMAT, *sizes, root, least]
        for part in (rows, self._nodes, self._edges):
            numbers += (number for row in part for number in row)
        numbers += self._items
        return LengthPlan(struct.pack(f"<{len(numbers)}i", *numbers), frozenset(self._looser))

    def _state(self, parts: Iterable[Part]) -> int:
        """The state of the parts that can be at a position; 0 where none of them has a limit."""
        key = frozenset(parts)
        if not any(isinstance(part, int) and part in self._limited for part in key):
            return 0
        found = self._states.get(key)
        if found is None:
            if len(self._states) >= MAX_STATES:
                raise _TooLarge
            found = self._states[key] = len(self._states)
            self._pending.append(key)
        return found

    def _row(self, parts: frozenset[Part]) -> tuple[int, ...]:
        positions = [self._positions[part] for part in parts if isinstance(part, int)]
        constants = [json.loads(part) for part in parts if isinstance(part, str)]
        constants += (json.loads(text) for one in positions for text in one.constants)
        strings = self._alternatives(parts, String)
        bounds = self._bounds(strings, constants)
        text, reserve = self._text(strings, constants)
        maximum = UNLIMITED if bounds.maximum is None else min(bounds.maximum, UNLIMITED)
        other = self._state(_after(positions, constants, None))
        names = self._names(positions, constants, other)
        count = max((len(one.items) for one in positions), default=0)
        lists = [len(value) for value in constants if isinstance(value, list)]
        count = max(count, *lists) if lists else count
        items = [self._state(_after(positions, constants, index)) for index in range(count)]
        rest = self._state(_after(positions, constants, count))
        first = len(self._items)
        self._items += items
        longest = self._longest_name(self._alternatives(parts, Object), constants)
        minimum = min(bounds.minimum, UNLIMITED)
        list_ = first, len(items), rest
        return minimum, maximum, text, reserve, longest, names, other, *list_

    def _alternatives(self, parts: frozenset[Part], kind: type[T]) -> list[T]:
        """The alternatives of a kind that can be here."""
        values = self._document.values
        found = (one for part in parts if isinstance(part, int) for one in values[part])
        return [one for one in found if isinstance(one, kind)]

    def _longest_name(self, objects: list[Object], constants: list[Any]) -> int:
        """The greatest length of a name in the objects that can be here; notes those that are tighter."""
        kinds = [kind.names for one in objects for kind in one.additional]
        if not any(names.maximum_by for names in kinds):
            return UNLIMITED
        found = {names.maximum for names in kinds}
        found.update(len(prop.name) for one in objects for prop in one.properties)
        found.update(len(name) for one in constants if isinstance(one, dict) for name in one)
        known = [one for one in found if one is not None]
        longest = max(known) if len(known) == len(found) else None
        for names in kinds:
            if names.maximum is None or names.maximum != longest:
                self._looser.update(names.maximum_by)
        return UNLIMITED if longest is None else min(longest, UNLIMITED)

    def _text(self, strings: list[String], constants: list[Any]) -> tuple[int, int]:
        """The first node of the text of a string that can be here, if it cannot end everywhere, and the
        most characters that it needs to end. Notes the bounds that cannot be kept."""
        if not any(one.automaton for one in strings):
            return NONE, 0
        if len(strings) == 1 and not any(isinstance(one, str) for one in constants):
            found = self._text_of(strings[0].automaton)
            if found is not None:
                return found
        self._looser.update(p for one in strings if one.automaton for p in one.maximum_by)
        return NONE, 0

    def _text_of(self, automaton: Dfa | None) -> tuple[int, int] | None:
        assert automaton is not None
        if automaton not in self._texts:
            try:
                nodes = text_nodes(automaton, self._room)
            except TooManyEdges:
                self._texts[automaton] = None
                return None
            first = len(self._nodes)
            if first + len(nodes) > MAX_NODES:
                raise _TooLarge
            self._room -= sum(len(node.edges) for node in nodes)
            for node in nodes:
                self._nodes.append([len(self._edges), len(node.edges), NONE, node.distance])
                self._edges += (
                    (byte, NONE if target == NONE else first + target)
                    for byte, target in node.edges
                )
            self._texts[automaton] = first, max(node.distance for node in nodes)
        return self._texts[automaton]

    def _bounds(self, strings: list[String], constants: list[Any]) -> Bounds:
        """The widest bounds of the strings that can be here; notes those that are tighter."""
        own = [Bounds(len(one), len(one)) for one in constants if isinstance(one, str)]
        found = [*own, *map(_writable, strings)]
        if not found:
            return Bounds(0, None)
        widest = found[0]
        for one in found[1:]:
            widest = widest.loosest(one)
        for string in strings:
            if string.minimum > widest.minimum:
                self._looser.update(string.minimum_by)
            if string.maximum != widest.maximum:
                self._looser.update(string.maximum_by)
        return widest

    def _names(self, positions: list[Position], constants: list[Any], other: int) -> int:
        """The first node of the names that lead to another state than all other names do."""
        names = {name: None for one in positions for name in one.properties}
        names |= {name: None for one in constants if isinstance(one, dict) for name in one}
        states = {name: self._state(_after(positions, constants, name)) for name in sorted(names)}
        special = {name: state for name, state in states.items() if state != other}
        return self._tree(special) if special else NONE

    def _tree(self, states: Mapping[str, int]) -> int:
        tree: dict[int, Any] = {}
        for name, state in states.items():
            node = tree
            for byte in _written(name):
                node = node.setdefault(byte, {})
            node[NONE] = state
        first = len(self._nodes)
        self._nodes.append([0, 0, NONE, 0])
        pending = [(first, tree)]
        while pending:
            number, node = pending.pop()
            below = sorted((byte, child) for byte, child in node.items() if byte != NONE)
            if len(self._nodes) + len(below) > MAX_NODES:
                raise _TooLarge
            self._nodes[number] = [len(self._edges), len(below), node.get(NONE, NONE), 0]
            edges = []
            for byte, child in below:
                edges.append((byte, len(self._nodes)))
                pending.append((len(self._nodes), child))
                self._nodes.append([0, 0, NONE, 0])
            spans = byte_spans(edges)
            self._nodes[number][1] = len(spans)
            self._edges += spans
        return first


def _limited(document: Document) -> set[Reference]:
    """The values that have a limited string, or a part that has one."""
    found: set[Reference] = set()
    holders: dict[Reference, set[Reference]] = {}
    for reference, alternatives in document.values.items():
        if any(map(_is_limited, alternatives)):
            found.add(reference)
        for one in alternatives:
            for part in references(one):
                holders.setdefault(part, set()).add(reference)
    pending = list(found)
    while pending:
        for holder in holders.get(pending.pop(), set()) - found:
            found.add(holder)
            pending.append(holder)
    return found


def _is_limited(one: Alternative) -> bool:
    if isinstance(one, Object):
        return any(kind.names.maximum_by for kind in one.additional)
    return isinstance(one, String) and one.is_limited


def _after(
    positions: Iterable[Position], constants: Iterable[Any], step: str | int | None
) -> Iterable[Part]:
    """The parts that a step leads to; None: a name that nothing declares."""
    for one in positions:
        yield from one.additional if step is None else one.after(step)
        if isinstance(step, int):
            yield from (text for text in one.item_constants if text[0] in '"[{')
    for value in constants:
        if isinstance(value, dict) and isinstance(step, str):
            yield from _part(value.get(step))
        if isinstance(value, list) and isinstance(step, int):
            yield from (part for one in value[step : step + 1] for part in _part(one))


def _part(value: Any) -> Iterable[Part]:
    if isinstance(value, str | list | dict):
        yield json.dumps(value)


def _writable(string: String) -> Bounds:
    """Bounds within which each text that the grammar writes for a string can come to an end."""
    texts = string.texts
    if isinstance(texts, AnyText | OtherText):
        return Bounds(string.minimum, string.maximum)
    least, greatest = 0, None
    if isinstance(texts, AcceptedText):
        least, greatest = texts.automaton.lengths()
    if string.minimum_by:
        least = max(least, string.minimum)
    if string.maximum_by and string.maximum is not None:
        greatest = string.maximum if greatest is None else min(greatest, string.maximum)
    return Bounds(least, greatest)


def _written(name: str) -> bytes:
    return json.dumps(name, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass")
