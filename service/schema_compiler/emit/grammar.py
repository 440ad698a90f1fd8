"""A document of the intermediate representation as a grammar in EBNF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from service.schema_compiler import budget
from service.schema_compiler.emit import arrays, numbers, strings
from service.schema_compiler.emit.objects import OrderedObject
from service.schema_compiler.emit.rules import Rules, literal, one_of, pruned
from service.schema_compiler.emit.unordered_objects import UnorderedObject
from service.schema_compiler.ir.sizes import order
from service.schema_compiler.ir.values import (
    Alternative,
    Array,
    Constant,
    CountedArray,
    DistinctArray,
    Document,
    Number,
    Object,
    Reference,
    String,
    TextSet,
)

_MAX_INLINE = 60
"""Of an expression that is written wherever it is used. Compilers make rules of what is in brackets,
each time."""


def grammar_of(document: Document) -> str:
    """The grammar of a document, in which every value and every alternative has a text."""
    return _Emitter(document).run()


def choice_grammar(texts: Iterable[str]) -> str:
    """The grammar of one of several texts, as they are."""
    return Rules().text(one_of(map(literal, texts)))


def text_grammar(texts: TextSet) -> str:
    """The grammar of texts that are no JSON, such as those of a regular expression."""
    rules = Rules()
    return pruned(rules.text(strings.raw_text(texts, rules)))


class _Emitter:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._rules = Rules()
        self._written: dict[Reference, str] = {}
        # Equal sets are one object after lowering: they are found by identity, since to compare
        # automata would take longer.
        self._strings: dict[tuple[int, bool], str] = {}
        self._numbers: dict[int, str] = {}
        self._shared = _shared_properties(document)
        self._told_apart = _told_apart(document)

    def run(self) -> str:
        in_order, recursive = order(self._document)
        names = {one: self._rules.reserve("value") for one in in_order if one in recursive}
        self._written.update(names)
        for reference in in_order:
            budget.current().check()
            parts = list(dict.fromkeys(map(self._alternative, self._document.values[reference])))
            body = " | ".join(parts)
            if reference in names:
                self._rules.fill(names[reference], body)
            elif len(parts) == 1 and "(" not in body and len(body) < _MAX_INLINE:
                self._written[reference] = body
            else:
                self._written[reference] = self._rules.define("value", body)
        return pruned(self._rules.text(self._written[self._document.root]))

    def _value(self, reference: Reference) -> str:
        return self._written[reference]

    def _alternative(self, one: Alternative) -> str:
        if isinstance(one, Constant):
            return literal(one.text)
        if isinstance(one, String):
            return self._string(one.texts)
        if isinstance(one, Number):
            return self._number(one)
        if isinstance(one, Object):
            write = UnorderedObject if one.any_order else OrderedObject
            shared = frozenset(
                prop.name for prop in one.properties if (prop.name, *prop.values) in self._shared
            )
            return write(one, shared, self._rules, self._value, self._name).run()
        if isinstance(one, Array):
            return arrays.array(one, self._rules, self._value)
        if isinstance(one, CountedArray):
            return arrays.counted_array(one, self._rules, self._value)
        assert isinstance(one, DistinctArray)
        return arrays.distinct_array(one, self._rules)

    def _name(self, texts: TextSet) -> str:
        return self._string(texts, name=True)

    def _string(self, texts: TextSet, *, name: bool = False) -> str:
        key = id(texts), name
        if key not in self._strings:
            self._strings[key] = strings.string(
                texts, self._rules, name=name, told_apart=self._told_apart
            )
        return self._strings[key]

    def _number(self, one: Number) -> str:
        key = id(one.numbers)
        if key not in self._numbers:
            self._numbers[key] = numbers.number(one.numbers, self._rules)
        return self._numbers[key]


def _shared_properties(document: Document) -> set[tuple[object, ...]]:
    """Properties that several objects have, with their values."""
    counts = Counter(
        (prop.name, *prop.values)
        for alternatives in document.values.values()
        for one in alternatives
        if isinstance(one, Object)
        for prop in one.properties
    )
    return {key for key, count in counts.items() if count > 1}


def _told_apart(document: Document) -> frozenset[str]:
    """The characters of all texts that are excluded somewhere."""
    found: set[str] = set()
    for alternatives in document.values.values():
        for one in alternatives:
            if isinstance(one, String):
                found |= strings.excluded_characters(one.texts)
            elif isinstance(one, Object):
                for kind in one.additional:
                    if kind.names.apart is not None:
                        found |= strings.excluded_characters(kind.names.apart)
                    for texts in kind.names.extending.values():
                        found |= strings.excluded_characters(texts)
    return frozenset(found)
