"""Objects whose few properties may come in any order, as EBNF."""

from __future__ import annotations

import json

from service.schema_compiler.emit.objects import Name, Value
from service.schema_compiler.emit.rules import Rules, any_or_end, literal, one_of, sequence
from service.schema_compiler.ir.values import Object, beginnings


class UnorderedObject:
    """Writes a rule for each set of the declared properties that are there.

    shared: names of properties that other objects have, too, with the same values.
    """

    def __init__(
        self, one: Object, shared: frozenset[str], rules: Rules, value: Value, name: Name
    ) -> None:
        self.rules = rules
        self.names = [prop.name for prop in one.properties]
        self.required = sum(prop.required << i for i, prop in enumerate(one.properties))
        several = len(one.properties) > 1 or bool(one.additional)
        self.pairs: list[str] = []
        for prop in one.properties:
            key = literal(json.dumps(prop.name, ensure_ascii=False) + ": ")
            pair = f"{key} {value(prop.values[0].value)}"
            own_rule = several or prop.name in shared
            self.pairs.append(rules.define("property", pair) if own_rule else pair)
        self.additional: list[tuple[int, str]] = []
        """Additional properties, and the declared names with which theirs begin, as bits: these must
        not be there yet."""
        for kind in one.additional:
            expression = value(kind.values[0].value)
            if kind.names.apart is not None:
                self.additional.append((0, self._other(name(kind.names.apart), expression)))
            for declared, texts in kind.names.extending.items():
                within = set(beginnings(declared))
                bits = sum(1 << i for i, known in enumerate(self.names) if known in within)
                self.additional.append((bits, self._other(name(texts), expression)))

    def _other(self, name: str, value: str) -> str:
        return self.rules.define("other", f'{name} ": " {value}')

    def run(self) -> str:
        """The expression."""
        after: dict[int, str] = {}
        everything = (1 << len(self.pairs)) - 1
        start: list[str] = []
        for used in range(everything, -1, -1):
            nexts = [
                sequence(pair, after[used | 1 << i])
                for i, pair in enumerate(self.pairs)
                if not used >> i & 1
            ]
            others = [other for bits, other in self.additional if not bits & used]
            own = self.rules.reserve("more") if others else ""
            nexts += [sequence(other, own) for other in others]
            ends = used & self.required == self.required
            if not used:
                start = [*nexts, '""'] if ends else nexts
            if len(nexts) > 1 and used:
                nexts = [self.rules.define("next", " | ".join(nexts))]
            body = any_or_end([sequence('", "', follows) for follows in nexts], ends)
            if own:
                self.rules.fill(own, body)
                body = own
            elif nexts and ends:
                body = self.rules.define("more", body)
            after[used] = body
        return sequence('"{"', one_of(start), '"}"')
