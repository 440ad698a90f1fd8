"""The rules of objects: declared names in order, additional names anywhere between them.

After each member comes either an additional one or one of the next declared names, so that every text
is read in one way. Where members are counted or one must have something special, the rules are written
once for each count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.schema_compiler.emit.rules import Rules, any_or_end, literal, one_of, sequence
from service.schema_compiler.emit.unordered_objects import Shuffled
from service.schema_compiler.lower.additional_names import NameForms
from service.schema_compiler.normalize.nodes import State

Way = tuple[State, int]
"""What a value satisfies, and the marks that the member sets, as bits."""


@dataclass
class ObjectShape:
    """One alternative for objects.

    members: name, whether it is required, ways. further: of additional names, their forms and ways.
    low, high: number of members; high None is any. marks: all marks, which must be set at the end.
    any_order: whether the members may come in any order; else they come in this one.
    """

    members: list[tuple[str, bool, list[Way]]]
    further: list[tuple[NameForms, list[Way]]]
    low: int = 0
    high: int | None = None
    marks: int = 0
    any_order: bool = False
    common: frozenset[str] = frozenset()
    """Names of members that are members of other objects, too, with the same ways."""

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
        return (Shuffled if self.any_order else Writer)(self, rules, value).run()


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
        self.further = [(forms, self._ways(ways, value)) for forms, ways in shape.further]
        required = [i for i, (_, is_required, _) in enumerate(self.members) if is_required]
        self._optional_from = required[-1] + 1 if required else 0
        self._others = self._additional(required)
        self.counted = shape.low > 0 or shape.high is not None
        if shape.high is None and shape.low <= sum(r for _, r, _ in self.members):
            self.counted = False
        self.cap = shape.low if shape.high is None else shape.high
        self.often = self.counted or shape.marks > 0

    @staticmethod
    def _ways(ways: list[Way], value: Callable[[State], str | None]) -> list[tuple[str, int]]:
        found = [(value(state), marks) for state, marks in ways]
        return [(expression, marks) for expression, marks in found if expression is not None]

    def _additional(self, required: list[int]) -> list[list[tuple[str, int]]]:
        """Additional members, and the marks that they set, by the place of the next declared one."""
        last = len(self.members)
        found: list[list[tuple[str, int]]] = [[] for _ in range(last + 1)]
        reaches = [last - 1] * (last + 1)  # the last member that may come next
        for i in range(last - 1, -1, -1):
            reaches[i] = i if i in required else reaches[i + 1]
        for forms, ways in self.further:
            anywhere, longer = self._longer(forms)
            chain: str | None = None
            for i in range(last, -1, -1):
                if i < last and self.members[i][1]:
                    chain = None
                parts = [one for furthest, one in longer.get(i, ()) if furthest <= reaches[i]]
                chain = self._shared("longer", [*parts, *([chain] if chain else [])], twice=False)
                names = [one for one in (forms.apart, *anywhere, chain) if one is not None]
                name = self._shared("name", names, twice=False)
                if name is not None:
                    found[i] += [(f'{name} ": " {value}', marks) for value, marks in ways]
        return found

    def _longer(self, forms: NameForms) -> tuple[list[str], dict[int, list[tuple[int, str]]]]:
        """Names that begin with declared ones which no value fits, and the others: by the first place
        of these, with the last one."""
        places = {name: i for i, (name, _, ways) in enumerate(self.members) if ways}
        anywhere: list[str] = []
        found: dict[int, list[tuple[int, str]]] = {}
        for name, expression in forms.longer.items():
            within = [places[one] for one in forms.within(name) if one in places]
            if within:
                found.setdefault(min(within), []).append((max(within), expression))
            else:
                anywhere.append(expression)
        return anywhere, found

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
            for marks in {marks for _, ways in self.further for _, marks in ways}:
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
        pairs = [(self._pair(name, expression), marks) for expression, marks in ways]
        found: dict[Count, str | None] = {}
        for count in counts:
            parts = []
            for pair, marks in pairs:
                then = self._add(count, marks)
                rest = None if then is None else after.get(then)
                if rest is not None:
                    parts.append(sequence(pair, rest))
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
            for pair, marks in self._others[i]:
                other = self.rules.define("other", sequence('", "', pair))
                then = self._add(count, marks)
                if then == count:
                    own = own or self.rules.reserve("more")
                    parts.append(sequence(other, own))
                elif then is not None and found.get(then) is not None:
                    parts.append(sequence(other, str(found[then])))
            choice = choices.get(count)
            if choice is not None:
                parts.append(sequence('", "', choice))
            ends = self._ends(i, count)
            if not ends and (not parts or self._stuck(parts, own)):
                found[count] = None
                continue
            body = any_or_end(parts, ends)
            if own:
                self.rules.fill(own, body)
                body = own
            elif len(parts) > 1 or (parts and ends) or self.often:
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
        if self._others[0]:
            afters = self._afters(0, self._reached()[0], first)
            for pair, marks in self._others[0]:
                then = self._add(start, marks)
                if then is not None and afters.get(then) is not None:
                    parts.append(sequence(pair, str(afters[then])))
        choice = first.get(start)
        if choice is not None:
            parts.append(choice)
        if self._ends(0, start):
            parts.append('""')
        if not parts:
            return None
        return sequence('"{"', one_of(parts), '"}"')

    def _pair(self, name: str, expression: str) -> str:
        """A member, in a rule of its own where it is written in several places."""
        pair = f"{literal(json.dumps(name, ensure_ascii=False) + ': ')} {expression}"
        several = self.often or name in self.shape.common
        return self.rules.define("member", pair) if several else pair

    def _shared(self, hint: str, parts: list[str], twice: bool) -> str | None:
        """One expression, which may be used ``twice``."""
        if not parts:
            return None
        if len(parts) == 1 and not twice:
            return parts[0]
        return self.rules.define(hint, " | ".join(dict.fromkeys(parts)))
