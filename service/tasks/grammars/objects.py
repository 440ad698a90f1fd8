"""Objects: names in the order of the schema, further names anywhere between them.

After each member comes either a further one or one of the next declared names, so that every text is
read in one way. Where members are counted or one must have something special, the rules are written
once for each count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from service.tasks.grammars.context import REPEAT, Context
from service.tasks.grammars.ebnf import Rules, literal, one_of
from service.tasks.grammars.literals import Literal
from service.tasks.grammars.nodes import STRING, Atom, State, negated
from service.tasks.grammars.shapes import (
    Absent,
    Conjunction,
    Members,
    Names,
    Required,
    SomeMember,
    found,
)

MAX_RULES = 400
"""Rules for counting the members of one object; beyond, bounds are checked."""
MAX_CLASSES = 16
"""Kinds of further names, told apart by the patterns that they match."""
MAX_PATTERNS = 8
"""Patterns whose combinations are told apart."""
MAX_SHUFFLED = 3
"""Declared names that may come in any order; each set of those that are there has a rule."""
MAX_INLINE = 60
"""Characters of a member that is written out in several rules."""
MAX_MARKS = 2
"""Members of a special kind that one object must have, each for its own reason."""
_FINITE = re.compile(r"\^\(?(?:\?:)?([\w -]+(?:\|[\w -]+)*)\)?\$", re.ASCII)
_PATTERN_REPEAT = "names that match may repeat; list the names under properties"

Way = tuple[State, int]
"""What a value satisfies, and the marks that the member sets, as bits."""


@dataclass
class ObjectShape:
    """One alternative for objects.

    members: name, whether it is required, ways. further: expression of the name, ways.
    low, high: number of members; high None is any. marks: all marks, which must be set at the end.
    """

    members: list[tuple[str, bool, list[Way]]]
    further: list[tuple[str, list[Way]]]
    low: int = 0
    high: int | None = None
    marks: int = 0
    second: list[int] | None = None
    """Another order of the members that is as good."""

    def children(self) -> Iterable[State]:
        """The states of values."""
        for _, _, ways in self.members:
            yield from (state for state, _ in ways)
        for _, ways in self.further:
            yield from (state for state, _ in ways)

    def shortest(self, length: Callable[[State], int | None]) -> int | None:
        """Characters of a shortest text, about and not below; None where there is none."""
        total, count = 2, 0
        pairs: list[int] = []
        for name, required, ways in self.members:
            own = [n for n in (length(state) for state, _ in ways) if n is not None]
            if own:
                pairs.append(min(own) + len(name) + 6)
                if required:
                    total += max(own) + len(name) + 6
                    count += 1
            elif required:
                return None
        further = [
            n for _, ways in self.further for n in (length(s) for s, _ in ways) if n is not None
        ]
        if self.high is not None and count > self.high:
            return None
        if not further and len(pairs) < self.low:
            return None
        if self.marks or self.low > count or self.high is not None:
            if self.write(Rules(), lambda s: None if length(s) is None else "x") is None:
                return None
            total += max(self.low - count, self.marks.bit_count(), 0) * max(
                (*(n + 8 for n in further), *pairs), default=0
            )
        return total

    def write(self, rules: Rules, value: Callable[[State], str | None]) -> str | None:
        """The expression, or None where no object fits."""
        if len(self.members) <= MAX_SHUFFLED and not (
            self.low or self.high is not None or self.marks
        ):
            return Shuffled(self, rules, value).run()
        one = Writer(self, rules, value).run()
        if one is None or self.second is None:
            return one
        shape = replace(self, members=[self.members[i] for i in self.second])
        other = Writer(shape, rules, value).run()
        return one if other is None else one_of((one, other))


Count = tuple[int, int]
"""Members so far, as far as it matters, and marks that are set."""


class Writer:
    """Writes the rules from the last name to the first."""

    def __init__(
        self, shape: ObjectShape, rules: Rules, value: Callable[[State], str | None]
    ) -> None:
        self.shape = shape
        self.rules = rules
        self.members = [
            (name, required, self._ways(ways, value)) for name, required, ways in shape.members
        ]
        self.further = [(name, self._ways(ways, value)) for name, ways in shape.further]
        self.counted = shape.low > 0 or shape.high is not None
        if shape.high is None and shape.low <= sum(r for _, r, _ in self.members):
            self.counted = False
        self.cap = shape.low if shape.high is None else shape.high
        self.often = self.counted or shape.marks > 0

    @staticmethod
    def _ways(ways: list[Way], value: Callable[[State], str | None]) -> list[tuple[str, int]]:
        found = [(value(state), marks) for state, marks in ways]
        return [(expression, marks) for expression, marks in found if expression is not None]

    def run(self) -> str | None:
        last = len(self.members)
        reached = self._reached()
        after: dict[Count, str | None] = {}
        first: dict[Count, str | None] = {}
        for i in range(last, -1, -1):
            first = self._choices(i, reached[i], after, first)
            if i:
                after = self._afters(i, reached[i], first)
        whole = self._open(first)
        return whole

    def _add(self, count: Count, marks: int) -> Count | None:
        """The count after one more member; None where there are too many."""
        number, seen = count
        if self.counted:
            number += 1
            if number > self.cap:
                if self.shape.high is not None:
                    return None
                number = self.cap
        return number, seen | marks

    def _closed(self, counts: set[Count]) -> set[Count]:
        """With any number of further members."""
        pending = list(counts)
        while pending:
            count = pending.pop()
            for _, ways in self.further:
                for _, marks in ways:
                    after = self._add(count, marks)
                    if after is not None and after not in counts:
                        counts.add(after)
                        pending.append(after)
        return counts

    def _reached(self) -> list[set[Count]]:
        reached = [self._closed({(0, 0)})]
        for _, required, ways in self.members:
            nexts = set() if required else set(reached[-1])
            for count in reached[-1]:
                for _, marks in ways:
                    after = self._add(count, marks)
                    if after is not None:
                        nexts.add(after)
            reached.append(self._closed(nexts) if self.counted or self.shape.marks else nexts)
        return reached

    def _ends(self, i: int, count: Count) -> bool:
        number, seen = count
        if self.counted and number < self.shape.low:
            return False
        return seen == self.shape.marks and self._optional_from <= i

    @property
    def _optional_from(self) -> int:
        if not hasattr(self, "_rest"):
            required = [i for i, (_, r, _) in enumerate(self.members) if r]
            self._rest = required[-1] + 1 if required else 0
        return self._rest

    def _choices(
        self,
        i: int,
        counts: set[Count],
        after: dict[Count, str | None],
        skipped: dict[Count, str | None],
    ) -> dict[Count, str | None]:
        """Expressions for the next declared member, from place ``i`` on, and what follows."""
        if i == len(self.members):
            return dict.fromkeys(counts)
        name, required, ways = self.members[i]
        key = literal(json.dumps(name, ensure_ascii=False) + ": ")
        found: dict[Count, str | None] = {}
        for count in counts:
            parts = []
            for expression, marks in ways:
                then = self._add(count, marks)
                rest = None if then is None else after.get(then)
                if rest is not None:
                    parts.append(_sequence(key, expression, rest))
            if not required and skipped.get(count) is not None:
                parts.append(str(skipped[count]))
            twice = self.often or (i > 0 and not self.members[i - 1][1])
            found[count] = self._shared("some", parts, twice)
        return found

    def _afters(
        self, i: int, counts: set[Count], choices: dict[Count, str | None]
    ) -> dict[Count, str | None]:
        """Expressions for what follows a member at place ``i``."""
        found: dict[Count, str | None] = {}
        for count in sorted(counts, reverse=True):
            own = ""
            parts = []
            for key, ways in self.further:
                for expression, marks in ways:
                    then = self._add(count, marks)
                    if then == count:
                        own = own or self.rules.reserve("more")
                        parts.append(_sequence(key, '": "', expression, own))
                    elif then is not None and found.get(then) is not None:
                        parts.append(_sequence(key, '": "', expression, str(found[then])))
            choice = choices.get(count)
            if choice is not None:
                parts.append(choice)
            ends = self._ends(i, count)
            if not ends and (not parts or self._stuck(parts, own)):
                found[count] = None
                continue
            body = '""' if not parts else _sequence('", "', one_of(parts))
            if ends and parts:
                body = f'("" | {body})'
            if own:
                self.rules.fill(own, body)
                body = own
            elif self.often:
                body = self.rules.define("more", body)
            found[count] = body
        return found

    @staticmethod
    def _stuck(parts: list[str], own: str) -> bool:
        """Whether each way comes back here."""
        return bool(own) and all(part.endswith(f" {own}") for part in parts)

    def _open(self, first: dict[Count, str | None]) -> str | None:
        start: Count = (0, 0)
        parts = []
        if self.further:
            afters = self._afters(0, self._reached()[0], first)
            for key, ways in self.further:
                for expression, marks in ways:
                    then = self._add(start, marks)
                    if then is not None and afters.get(then) is not None:
                        parts.append(_sequence(key, '": "', expression, str(afters[then])))
        choice = first.get(start)
        if choice is not None:
            parts.append(choice)
        if self._ends(0, start):
            parts.append('""')
        if not parts:
            return None
        return _sequence('"{"', one_of(parts), '"}"')

    def _shared(self, hint: str, parts: list[str], twice: bool) -> str | None:
        """One expression, which may be used ``twice``."""
        if not parts:
            return None
        if len(parts) == 1 and not twice:
            return parts[0]
        return self.rules.define(hint, " | ".join(dict.fromkeys(parts)))


class Shuffled:
    """Writes few names in any order: a rule for each set of those that are there."""

    def __init__(
        self, shape: ObjectShape, rules: Rules, value: Callable[[State], str | None]
    ) -> None:
        self.rules = rules
        self.pairs: list[str] = []
        self.required = 0
        self.possible = True
        for name, required, ways in shape.members:
            expression = value(ways[0][0])
            if expression is not None:
                self.required |= int(required) << len(self.pairs)
                key = literal(json.dumps(name, ensure_ascii=False) + ": ")
                pair = f"{key} {expression}"
                self.pairs.append(pair if len(pair) < MAX_INLINE else rules.define("member", pair))
            elif required:
                self.possible = False
        several = ((key, value(ways[0][0])) for key, ways in shape.further)
        self.further = [
            f'{key} ": " {expression}' for key, expression in several if expression is not None
        ]

    def run(self) -> str | None:
        """The expression, or None where no object fits."""
        if not self.possible:
            return None
        after: dict[int, str] = {}
        everything = (1 << len(self.pairs)) - 1
        for used in range(everything, -1, -1):
            nexts = [
                _sequence(pair, after[used | 1 << i])
                for i, pair in enumerate(self.pairs)
                if not used >> i & 1
            ]
            own = self.rules.reserve("more") if self.further else ""
            nexts += [_sequence(pair, own) for pair in self.further]
            ends = used & self.required == self.required
            body = _sequence('", "', one_of(nexts)) if nexts else '""'
            if ends and nexts:
                body = f'("" | {body})'
            if own:
                self.rules.fill(own, body)
                body = own
            elif used.bit_count() > 1 and nexts:
                body = self.rules.define("more", body)
            after[used] = body
            if not used:
                start = [_sequence(pair, after[1 << i]) for i, pair in enumerate(self.pairs)]
                start += [_sequence(pair, own) for pair in self.further]
                start += ['""'] if ends else []
        return _sequence('"{"', one_of(start), '"}"')


def _sequence(*parts: str) -> str:
    return " ".join(part for part in parts if part != '""') or '""'


class _Reader:
    """Makes the shape of one conjunction."""

    def __init__(self, context: Context, conjunction: Conjunction, place: str) -> None:
        self.context = context
        self.nodes = context.nodes
        self.place = place
        self.members = [c for c in conjunction if isinstance(c, Members)]
        self.required = [c for c in conjunction if isinstance(c, Required)]
        self.absent = [c for c in conjunction if isinstance(c, Absent)]
        self.names = [c for c in conjunction if isinstance(c, Names)]
        self.some = [c for c in conjunction if isinstance(c, SomeMember)]
        self.literals = [c for c in conjunction if isinstance(c, Literal)]
        for dropped in self.some[MAX_MARKS:]:
            context.drop(dropped.pointer, "too many members of a special kind are asked for")
        self.some = self.some[:MAX_MARKS]
        self.low, self.low_at = 0, ""
        self.high: int | None = None
        self.high_at = ""

    def shape(self) -> ObjectShape | None:
        self._bounds()
        names = self._declared()
        needed = {name for constraint in self.required for name in constraint.names}
        members: list[tuple[str, bool, list[Way]]] = []
        for name in names:
            ways = self._ways(name)
            if ways:
                members.append((name, name in needed, ways))
            elif name in needed:
                return None
        further = self._further(names)
        marks = (1 << len(self.some)) - 1
        shape = ObjectShape(members, further, self.low, self.high, marks)
        shape.second = self._second([name for name, _, _ in members])
        return self._bounded(shape, len(needed))

    def _second(self, names: list[str]) -> list[int] | None:
        """Required names first, where the names seem to have lost the order of their author.

        That is where they are sorted, or ``required`` names them in another order.
        """
        needed = list(dict.fromkeys(n for c in self.required for n in c.names if n in names))
        if len(names) <= MAX_SHUFFLED or not needed:
            return None
        places = {name: i for i, name in enumerate(names)}
        order = [places[name] for name in needed]
        in_order = order == sorted(order)
        if order == list(range(len(order))) or (in_order and names != sorted(names)):
            return None
        return [*order, *(i for i, name in enumerate(names) if name not in set(needed))]

    def _bounded(self, shape: ObjectShape, needed: int) -> ObjectShape | None:
        """Without counting where it changes nothing or costs too much."""
        if shape.high is not None and not shape.further and len(shape.members) <= shape.high:
            shape.high = None
        if shape.high is not None and needed > shape.high:
            return None
        if shape.low <= needed:
            shape.low = 0
        if not shape.further and len(shape.members) < shape.low:
            return None
        if shape.further and (shape.high is None or shape.high - needed > 1):
            self._open_at()
        if (len(shape.members) + 1) * (shape.high or shape.low) > MAX_RULES:
            why = f"counting costs more than {MAX_RULES} rules"
            if shape.low:
                self.context.drop(self.low_at, why)
            if shape.high is not None:
                self.context.drop(self.high_at, why)
            shape.low, shape.high = 0, None
            if shape.further:
                self._open_at()
        return shape

    def _bounds(self) -> None:
        for constraint in self.literals:
            value = constraint.value
            if constraint.keyword == "minProperties" and value > self.low:
                self.low, self.low_at = int(value), constraint.pointer
            elif constraint.keyword == "maxProperties" and (self.high is None or value < self.high):
                self.high, self.high_at = int(value), constraint.pointer
            elif constraint.keyword == "enum":
                self.context.drop(constraint.pointer, "a value of this type is excluded as a whole")

    def _declared(self) -> list[str]:
        names: dict[str, None] = {}
        for members in self.members:
            names.update(dict.fromkeys(members.named))
        for one in self.some:
            if one.members is not None:
                names.update(dict.fromkeys(one.members.named))
        for pattern in self._patterns():
            names.update(dict.fromkeys(finite_names(pattern)))
        for constraint in self.required:
            names.update(dict.fromkeys(constraint.names))
        names.update(dict.fromkeys(constraint.name for constraint in self.absent))
        for values in self._listed_names():
            names.update(dict.fromkeys(values))
        return list(names)

    def _listed_names(self) -> Iterable[list[str]]:
        """Names where only some are allowed."""
        if self.names:
            state = self.nodes.reduced([c.atom for c in self.names])
            values = self.context.values(state)
            if values is not None:
                self.only_listed = True
                yield [value for value in values if isinstance(value, str)]

    only_listed = False

    def _patterns(self) -> list[str]:
        patterns = dict.fromkeys(p for members in self.members for p in members.patterns)
        for one in self.some:
            if one.pattern is not None:
                patterns[one.pattern] = None
            if one.members is not None:
                patterns.update(dict.fromkeys(one.members.patterns))
        return list(patterns)

    def _ways(self, name: str) -> list[Way]:
        """How a declared name may be there."""
        if any(constraint.name == name for constraint in self.absent):
            return []
        if not all(self._fits(name, constraint.atom) for constraint in self.names):
            return []
        if any(members.forbids(name) for members in self.members):
            return []
        atoms = [atom for members in self.members for atom in members.atoms(name)]
        for constraint in self.required:
            if constraint.atom is not None and name in constraint.names:
                atoms.append(constraint.atom)
        return self._marked(
            atoms, lambda one: one.covers(name) and (one.name is None or self._fits(name, one.name))
        )

    def _fits(self, name: str, atom: Atom) -> bool:
        return self.nodes.valid(self.nodes.of(atom), name) is not bool(atom & 1)

    def _marked(self, atoms: list[Atom], covers: Callable[[SomeMember], bool]) -> list[Way]:
        ways: list[tuple[list[Atom], int]] = [(atoms, 0)]
        for i, one in enumerate(self.some):
            if covers(one):
                extra = [] if one.atom is None else [one.atom]
                with_mark = [([*own, *extra], marks | 1 << i) for own, marks in ways]
                ways = with_mark + (ways if extra else [])
        found: dict[Way, None] = {}
        for own, marks in ways:
            if not any(not a & 1 and self.nodes.of(a).schema is False for a in own):
                found[self.context.part(own, self._open_pointer()[0]), marks] = None
        return list(found)

    # Further names

    def _further(self, declared: list[str]) -> list[tuple[str, list[Way]]]:
        if self.only_listed:
            return []
        patterns = [p for p in self._patterns() if not finite_names(p)]
        if not patterns and any(members.closed for members in self.members):
            return []
        further: list[tuple[str, list[Way]]] = []
        for matched, literals in self._classes(patterns):
            atoms = self._class_atoms(matched)
            if atoms is None:
                continue
            for named, covered in self._named_classes(literals):
                covers = partial(self._covers, matched=matched, named=covered)
                ways = self._marked(atoms, covers)
                expression = self._key(named, declared) if ways else None
                if expression is not None:
                    further.append((expression, ways))
        return further

    def _covers(self, one: SomeMember, matched: frozenset[str], named: frozenset[Atom]) -> bool:
        if one.name is not None and one.name not in named:
            return False
        if one.pattern is not None:
            return one.pattern in matched
        return one.members is None or matched.isdisjoint(one.members.patterns)

    def _class_atoms(self, matched: frozenset[str]) -> list[Atom] | None:
        """What values of a class of names satisfy; None where the class is forbidden."""
        atoms: list[Atom] = []
        for members in self.members:
            hits = [a for p, a in members.patterns.items() if p in matched]
            if not hits:
                if members.closed:
                    return None
                hits = [members.further]
            atoms += [atom for atom in hits if atom is not None]
        return atoms

    def _classes(self, patterns: Sequence[str]) -> list[tuple[frozenset[str], list[Literal]]]:
        """Sets of patterns that names can match together, with the literals that say so."""
        at = {p: f"{m.pointer}/patternProperties" for m in self.members for p in m.patterns}
        classes: list[tuple[frozenset[str], list[Literal]]] = [(frozenset(), [])]
        if len(patterns) > 1:
            self.context.note(at.get(patterns[0], self.place), "patterns of names made disjoint")
        for i, pattern in enumerate(patterns):
            pointer = at.get(pattern, "")
            if i >= MAX_PATTERNS or len(classes) > MAX_CLASSES:
                self._drop_patterns("too many patterns of names overlap")
                return [*classes, *self._plain_classes(patterns[i:], at)]
            split: list[tuple[frozenset[str], list[Literal]]] = []
            for matched, literals in classes:
                split.append((matched, [*literals, Literal("pattern", pattern, pointer, True)]))
                both = (matched | {pattern}, [*literals, Literal("pattern", pattern, pointer)])
                if not matched or self.context.string(both[1], key=True).expression is not None:
                    split.append(both)
            classes = split
        return classes

    @staticmethod
    def _plain_classes(
        patterns: Sequence[str], at: dict[str, str]
    ) -> list[tuple[frozenset[str], list[Literal]]]:
        return [(frozenset((p,)), [Literal("pattern", p, at.get(p, ""))]) for p in patterns]

    def _drop_patterns(self, why: str) -> None:
        for members in self.members:
            if members.patterns:
                self.context.drop(f"{members.pointer}/patternProperties", why)
                if members.further is not None:
                    self.context.drop(f"{members.pointer}/{members.keyword}", why)

    def _named_classes(
        self, literals: list[Literal]
    ) -> Iterable[tuple[list[Literal], frozenset[Atom]]]:
        """The class by what ``propertyNames`` says of names, and its violation where one is asked."""
        required = [constraint.atom for constraint in self.names]
        asked = [one.name for one in self.some if one.name is not None]
        for k in range(1 << len(asked)):
            chosen = [atom for i, atom in enumerate(asked) if k >> i & 1]
            rest = [negated(atom) for i, atom in enumerate(asked) if not k >> i & 1]
            state = self.nodes.reduced([*required, *chosen, *rest])
            for one in self.context.expand(state)[STRING]:
                own = [c for c in one if isinstance(c, Literal)]
                yield [*literals, *own], frozenset(chosen)

    def _key(self, literals: list[Literal], declared: list[str]) -> str | None:
        own = [Literal("enum", declared, negated=True)] if declared else []
        emitted = self.context.string([*literals, *own], key=True)
        for dropped, why in emitted.dropped:
            if dropped.pointer:
                self.context.drop(dropped.pointer, why)
                continue
            for members in self.members:
                if members.named:
                    self.context.drop(f"{members.pointer}/properties", why)
                if members.further is not None:
                    self.context.drop(f"{members.pointer}/{members.keyword}", why)
            for pointer in [c.pointer for c in self.required] + [c.pointer for c in self.absent]:
                self.context.drop(pointer, why)
        if any(dropped.keyword == "pattern" for dropped, _ in emitted.dropped):
            self._drop_patterns("names cannot be told apart")
        return emitted.expression

    def _open_at(self) -> None:
        """Note that names may repeat, at the keyword that lets them."""
        self.context.drop(*self._open_pointer())

    def _open_pointer(self) -> tuple[str, str]:
        for members in self.members:
            if members.further is not None and not members.closed:
                return f"{members.pointer}/{members.keyword}", REPEAT
        for members in self.members:
            if members.closed and members.patterns:
                return f"{members.pointer}/patternProperties", _PATTERN_REPEAT
        place = self.members[0].pointer if self.members else self.place
        return f"{place}/additionalProperties", REPEAT


def finite_names(pattern: str) -> list[str]:
    """The names that a pattern lists, if it does nothing else."""
    match = _FINITE.fullmatch(pattern)
    if match is None or ("|" in match[1] and "(" not in pattern):
        return []
    names = match[1].split("|")
    return names if all(found(pattern, name) for name in names) else []


def read_object(context: Context, conjunction: Conjunction, place: str) -> ObjectShape | None:
    """The shape of a conjunction for objects, or None where no object fits.

    place: pointer of a subschema that the objects belong to.
    """
    return _Reader(context, conjunction, place).shape()
