"""The rules of objects whose few names may come in any order."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.tasks.grammars.ebnf import Rules, any_or_end, literal, one_of, sequence
from service.tasks.grammars.nodes import State

if TYPE_CHECKING:
    from service.tasks.grammars.object_rules import ObjectShape


class Shuffled:
    """Writes few names in any order: a rule for each set of those that are there."""

    def __init__(
        self, shape: ObjectShape, rules: Rules, value: Callable[[State], str | None]
    ) -> None:
        self.rules = rules
        self.pairs: list[str] = []
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
            elif required:
                self.possible = False
        further = ((key, value(ways[0][0])) for key, ways in shape.further)
        self.further = [
            f'{key} ": " {expression}' for key, expression in further if expression is not None
        ]
        self.others = [rules.define("other", sequence('", "', pair)) for pair in self.further]

    def run(self) -> str | None:
        """The expression, or None where no object fits."""
        if not self.possible:
            return None
        after: dict[int, str] = {}
        everything = (1 << len(self.pairs)) - 1
        for used in range(everything, -1, -1):
            nexts = [
                sequence(pair, after[used | 1 << i])
                for i, pair in enumerate(self.pairs)
                if not used >> i & 1
            ]
            own = self.rules.reserve("more") if self.further else ""
            nexts = [sequence('", "', follows) for follows in nexts]
            nexts += [sequence(other, own) for other in self.others]
            ends = used & self.required == self.required
            body = any_or_end(nexts, ends)
            if own:
                self.rules.fill(own, body)
                body = own
            elif len(nexts) > 1 or (nexts and ends):
                body = self.rules.define("more", body)
            after[used] = body
            if not used:
                start = [sequence(pair, after[1 << i]) for i, pair in enumerate(self.pairs)]
                start += [sequence(pair, own) for pair in self.further]
                start += ['""'] if ends else []
        return sequence('"{"', one_of(start), '"}"')
