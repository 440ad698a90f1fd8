"""Objects as EBNF: declared properties in order, additional properties anywhere between them.

After each property comes either an additional one or one of the next declared ones, so that each text
has one derivation. Where properties are counted or obligations must be met, the rules are written once
for each count.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from service.schema_compiler.emit.rules import OWN, Rules, any_or_end, literal, one_of, sequence
from service.schema_compiler.ir.values import (
    NameSet,
    Object,
    PropertyValue,
    Reference,
    TextSet,
    names_by_position,
)

Value = Callable[[Reference], str]
"""The expression of a value."""
Name = Callable[[TextSet], str]
"""The expression of a property name, quotes included."""


Count = tuple[int, int]
"""Properties so far, as far as it matters, and obligations that they meet, as bits."""


class OrderedObject:
    """Writes the rules from the last property to the first.

    shared: names of properties that other objects have, too, with the same values.
    """

    def __init__(
        self, one: Object, shared: frozenset[str], rules: Rules, value: Value, name: Name
    ) -> None:
        self.object = one
        self.shared = shared
        self.rules = rules
        self._name = name
        self.properties = [
            (prop.name, prop.required, _written(prop.values, value)) for prop in one.properties
        ]
        self.additional = [
            (kind.names, _written(kind.values, value), one.lasting & kind.can_meet)
            for kind in one.additional
        ]
        required = [i for i, (_, is_required, _) in enumerate(self.properties) if is_required]
        self._optional_from = required[-1] + 1 if required else 0
        self._everywhere: set[str] = set()
        """Additional properties that may stand at every position."""
        self._others = self._additional()
        self.counted = one.minimum > 0 or one.maximum is not None
        if one.maximum is None and one.minimum <= len(required):
            self.counted = False
        self.cap = one.minimum if one.maximum is None else one.maximum
        self.often = self.counted or one.obligations > 0
        self._all_met = (1 << one.obligations) - 1

    def _additional(self) -> list[list[tuple[str, int, int]]]:
        """Additional properties, the obligations that they meet, and those that they have to meet once they
        are met, by the position of the next declared one."""
        last = len(self.properties)
        found: list[list[tuple[str, int, int]]] = [[] for _ in range(last + 1)]
        for names, values, lasting in self.additional:
            everywhere, extending = self._names(names)
            name = self._shared("name", everywhere, twice=False)
            chain: str | None = None
            for i in range(last, -1, -1):
                if i < last and self.properties[i][1]:
                    chain = None
                parts = [*extending.get(i, ()), *([chain] if chain else [])]
                chain = self._shared("longer", parts, twice=False)
                for one in (name, chain):
                    if one is not None:
                        found[i] += [
                            (f'{one} ": " {value}', meets, lasting) for value, meets in values
                        ]
            if name is not None:
                self._everywhere |= {f'{name} ": " {value}' for value, _ in values}
        return found

    def _names(self, names: NameSet) -> tuple[list[str], dict[int, list[str]]]:
        """Names that may stand at every position, and the others by the last position."""
        anywhere, extending = names_by_position(self.object.properties, names)
        apart = [] if names.apart is None else [names.apart]
        by_position = {i: [self._name(one) for one in sets] for i, sets in extending.items()}
        return [self._name(one) for one in (*apart, *anywhere)], by_position

    def run(self) -> str:
        """The expression."""
        last = len(self.properties)
        reached = self._reached()
        after: dict[Count, str | None] = {}
        first: dict[Count, str | None] = {}
        for i in range(last, -1, -1):
            first = self._choices(i, reached[i], after, first)
            if i:
                after = self._afters(i, reached[i], first)
        return self._open(first)

    def _add(self, count: Count, meets: int) -> Count | None:
        """The count after one more property; None where there are too many."""
        number, seen = count
        if self.counted:
            number += 1
            if number > self.cap:
                if self.object.maximum is not None:
                    return None
                number = self.cap
        return number, seen | meets

    def _closed(self, counts: set[Count]) -> set[Count]:
        """With any number of additional properties."""
        pending = list(counts)
        while pending:
            count = pending.pop()
            for meets in {meets for _, ways, _ in self.additional for _, meets in ways}:
                after = self._add(count, meets)
                if after is not None and after not in counts:
                    counts.add(after)
                    pending.append(after)
        return counts

    def _reached(self) -> list[set[Count]]:
        reached = [self._closed({(0, 0)})]
        for _, required, ways in self.properties:
            nexts = set() if required else set(reached[-1])
            for count in reached[-1]:
                for _, meets in ways:
                    after = self._add(count, meets)
                    if after is not None:
                        nexts.add(after)
            reached.append(self._closed(nexts) if self.often else nexts)
        return reached

    def _ends(self, i: int, count: Count) -> bool:
        number, seen = count
        if self.counted and number < self.object.minimum:
            return False
        return seen == self._all_met and self._optional_from <= i

    def _choices(
        self,
        i: int,
        counts: set[Count],
        after: dict[Count, str | None],
        skipped: dict[Count, str | None],
    ) -> dict[Count, str | None]:
        """Expressions for the next declared property, from position ``i`` on, and what follows."""
        if i == len(self.properties):
            return dict.fromkeys(counts)
        name, required, ways = self.properties[i]
        pairs = [(self._pair(name, expression), meets) for expression, meets in ways]
        found: dict[Count, str | None] = {}
        for count in counts:
            parts = []
            for pair, meets in pairs:
                then = self._add(count, meets)
                rest = None if then is None else after.get(then)
                if rest is not None:
                    parts.append(sequence(pair, rest))
            if not required and skipped.get(count) is not None:
                parts.append(str(skipped[count]))
            twice = self.often or (i > 0 and not self.properties[i - 1][1])
            found[count] = self._shared("some", parts, twice)
        return found

    def _afters(
        self, i: int, counts: set[Count], choices: dict[Count, str | None]
    ) -> dict[Count, str | None]:
        """Expressions for what follows a property at position ``i``."""
        found: dict[Count, str | None] = {}
        for count in sorted(counts, reverse=True):
            recursive = False
            parts = []
            for pair, meets, lasting in self._others[i]:
                if count[1] & lasting & ~meets:
                    continue
                other = sequence('", "', pair)
                if self.often or pair in self._everywhere:
                    other = self.rules.define("other", other)
                then = self._add(count, meets)
                if then == count:
                    recursive = True
                    parts.append(sequence(other, OWN))
                elif then is not None and found.get(then) is not None:
                    parts.append(sequence(other, str(found[then])))
            choice = choices.get(count)
            if choice is not None:
                parts.append(sequence('", "', choice))
            ends = self._ends(i, count)
            if not ends and all(part.endswith(f" {OWN}") for part in parts):
                found[count] = None
                continue
            body = any_or_end(parts, ends)
            if recursive:
                body = self.rules.define_recursive("more", body)
            elif len(parts) > 1 or (parts and ends) or self.often:
                body = self.rules.define("more", body)
            found[count] = body
        return found

    def _open(self, first: dict[Count, str | None]) -> str:
        start: Count = (0, 0)
        parts = []
        if self._others[0]:
            afters = self._afters(0, self._reached()[0], first)
            for pair, meets, _ in self._others[0]:
                then = self._add(start, meets)
                if then is not None and afters.get(then) is not None:
                    parts.append(sequence(pair, str(afters[then])))
        choice = first.get(start)
        if choice is not None:
            parts.append(choice)
        if self._ends(0, start):
            parts.append('""')
        assert parts, "objects without a text are pruned before"
        return sequence('"{"', one_of(parts), '"}"')

    def _pair(self, name: str, expression: str) -> str:
        """A property, in a rule of its own where it is written in several places."""
        pair = f"{literal(json.dumps(name, ensure_ascii=False) + ': ')} {expression}"
        several = self.often or name in self.shared
        return self.rules.define("property", pair) if several else pair

    def _shared(self, hint: str, parts: list[str], twice: bool) -> str | None:
        """One expression, which may be used ``twice``."""
        if not parts:
            return None
        if len(parts) == 1 and not twice:
            return parts[0]
        return self.rules.define(hint, " | ".join(dict.fromkeys(parts)))


def _written(values: tuple[PropertyValue, ...], value: Value) -> list[tuple[str, int]]:
    return [(value(one.value), one.meets) for one in values]
