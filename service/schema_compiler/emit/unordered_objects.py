"""Objects whose properties may come in any order, as EBNF.

The last member of a name counts, so that a grammar need not remember which optional properties are there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from service.schema_compiler.emit.objects import Name, Value
from service.schema_compiler.emit.rules import OWN, Rules, any_or_end, literal, one_of, sequence
from service.schema_compiler.ir.values import AnyOrder, Object

State = tuple[int, int]
"""The properties that are there out of those that are told apart, as bits, and the number of others, as
far as it matters."""


class UnorderedObject:
    """Writes a rule for each set of the properties that are there, out of those that are told apart.

    shared: names of properties that other objects have, too, with the same values.
    """

    def __init__(
        self, one: Object, shared: frozenset[str], rules: Rules, value: Value, name: Name
    ) -> None:
        assert one.any_order is not None
        self.object = one
        self.rules = rules
        told = [prop for prop in one.properties if prop.required or one.any_order.all_told]
        self.sets = _Sets([prop.name for prop in told], one.any_order)
        self.required = sum(prop.required << i for i, prop in enumerate(told))
        self.all = (1 << len(told)) - 1
        self.again = bool(one.additional)
        """Whether each declared property may come at any time. Else an additional name could begin with
        one that cannot be written, and go on with letters that nobody meant."""
        needed = self.required.bit_count()
        self.most_others = max(one.minimum - needed, 0)
        if one.maximum is not None:
            self.most_others = one.maximum - needed
        pairs: dict[str, str] = {}
        for prop in one.properties:
            key = literal(json.dumps(prop.name, ensure_ascii=False) + ": ")
            pair = f"{key} {value(prop.values[0].value)}"
            own_rule = prop in told or prop.name in shared
            pairs[prop.name] = rules.define("property", pair) if own_rule else pair
        self.pairs = [pairs.pop(prop.name) for prop in told]
        others = [*pairs.values()]
        for kind in one.additional:
            expression = value(kind.values[0].value)
            apart = [] if kind.names.apart is None else [kind.names.apart]
            for texts in (*apart, *kind.names.extending.values()):
                others.append(rules.define("other", f'{name(texts)} ": " {expression}'))
        self.other = self._any_of("some", others)
        """Any member that is not told apart."""

    def run(self) -> str:
        """The expression."""
        after: dict[State, str] = {}
        for state in sorted(self._reached(), reverse=True):
            ways = [
                sequence(self._behind_comma(member), OWN if then == state else after[then])
                for member, then in self._steps(state).items()
            ]
            body = any_or_end(ways, self._ends(state))
            if f" {OWN}" in body:
                body = self.rules.define_recursive("more", body)
            elif len(ways) > 1 or (ways and self._ends(state)):
                body = self.rules.define("more", body)
            after[state] = body
        start: State = (0, 0)
        ways = [sequence(member, after[then]) for member, then in self._steps(start).items()]
        if self._ends(start):
            ways.append('""')
        return sequence('"{"', one_of(ways), '"}"')

    def _any_of(self, hint: str, members: list[str]) -> str:
        if len(members) < 2:
            return "".join(members)
        return self.rules.define(hint, " | ".join(members))

    def _behind_comma(self, member: str) -> str:
        """The member in a rule with its comma. In the rule of a state, the comma would be two places for
        which compilers make a mask, for each state."""
        return self.rules.define("member", sequence('", "', member))

    def _reached(self) -> set[State]:
        found: set[State] = {(0, 0)}
        pending = [(0, 0)]
        while pending:
            for then in self._steps(pending.pop()).values():
                if then not in found:
                    found.add(then)
                    pending.append(then)
        return found

    def _steps(self, state: State) -> dict[str, State]:
        """The members that may come next, and the states behind them."""
        told, others = state
        found: dict[str, State] = {}
        waiting = 0
        for i, pair in enumerate(self.pairs):
            bit = 1 << i
            if told & bit or not self.sets.has(told | bit):
                waiting |= bit
            elif self.required & bit or self._has_room(state):
                found[pair] = told | bit, others
        if self.again:
            found |= dict.fromkeys(self._among(waiting, 0, len(self.pairs)), state)
        if self.other and self._has_room(state):
            found[self.other] = told, min(others + 1, self.most_others)
        return found

    def _among(self, chosen: int, first: int, last: int) -> Iterator[str]:
        """Expressions for any of the chosen members of a range. Halves of which all are chosen are rules:
        compilers take long for many alternatives in many rules."""
        block = ((1 << last) - (1 << first)) & chosen
        if not block:
            return
        if block.bit_count() < last - first:
            middle = (first + last) // 2
            yield from self._among(chosen, first, middle)
            yield from self._among(chosen, middle, last)
        else:
            yield self._any_of("block", self.pairs[first:last])

    def _has_room(self, state: State) -> bool:
        """Whether one more property that is not required may come."""
        told, others = state
        if self.object.maximum is None:
            return True
        return (told | self.required).bit_count() + others < self.object.maximum

    def _ends(self, state: State) -> bool:
        told, others = state
        if told & self.required != self.required:
            return False
        return told.bit_count() + others >= self.object.minimum


class _Sets:
    """The sets of properties that may be there at once."""

    def __init__(self, names: list[str], order: AnyOrder) -> None:
        self._ahead = order.ahead
        bits = {name: 1 << i for i, name in enumerate(names)}
        self._orders = [[bits[name] for name in one if name in bits] for one in order.orders]
        self._known: dict[int, bool] = {}

    def has(self, told: int) -> bool:
        """Whether in some order nothing is there that is too far ahead of the first that is not."""
        found = self._known.get(told)
        if found is None:
            found = self._known[told] = any(self._is_near(told, one) for one in self._orders)
        return found

    def _is_near(self, told: int, order: list[int]) -> bool:
        first = next((i for i, bit in enumerate(order) if not told & bit), len(order))
        return not any(told & bit for bit in order[first + self._ahead + 1 :])
