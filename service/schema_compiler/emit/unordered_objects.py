"""The rules of objects whose few names may come in any order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.schema_compiler.emit.rules import Rules, any_or_end, literal, one_of, sequence
from service.schema_compiler.normalize.nodes import State

if TYPE_CHECKING:
    from service.schema_compiler.emit.objects import ObjectShape

MAX_SHUFFLED = 8
"""Declared names that may come in any order; each set of those that are there has a rule."""


class Shuffled:
    """Writes few names in any order: a rule for each set of those that are there."""

    def __init__(
        self, shape: ObjectShape, rules: Rules, value: Callable[[State], str | None]
    ) -> None:
        self.rules = rules
        self.pairs: list[str] = []
        self.names: list[str] = []
        self.required = 0
        self.possible = True
        several = len(shape.members) > 1 or bool(shape.further)
        for name, required, ways in shape.members:
            expression = value(ways[0][0])
            if expression is not None:
                self.required |= int(required) << len(self.pairs)
                key = literal(json.dumps(name, ensure_ascii=False) + ": ")
                pair = f"{key} {expression}"
                own_rule = several or name in shape.common
                self.pairs.append(rules.define("member", pair) if own_rule else pair)
                self.names.append(name)
            elif required:
                self.possible = False
        self.additional: list[tuple[int, str]] = []
        """Additional members, and the declared names with which they begin, as bits: these must not be
        there yet."""
        for forms, ways in shape.further:
            expression = value(ways[0][0])
            if expression is None:
                continue
            if forms.apart is not None:
                self.additional.append((0, self._other(forms.apart, expression)))
            for name, longer in forms.longer.items():
                within = set(forms.within(name))
                bits = sum(1 << i for i, one in enumerate(self.names) if one in within)
                self.additional.append((bits, self._other(longer, expression)))

    def _other(self, name: str, value: str) -> str:
        return self.rules.define("other", f'{name} ": " {value}')

    def run(self) -> str | None:
        """The expression, or None where no object fits."""
        if not self.possible:
            return None
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
