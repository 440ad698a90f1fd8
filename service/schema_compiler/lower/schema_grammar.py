"""The grammar of a JSON schema.

Three passes: the states that can be reached, with the shapes of their values; which of them have a
value at all; the rules. All without recursion, since references can chain as long as a schema is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from service.errors import GrammarError
from service.schema_compiler import budget
from service.schema_compiler.budget import BudgetExceeded
from service.schema_compiler.emit.arrays import ArrayShape
from service.schema_compiler.emit.objects import ObjectShape
from service.schema_compiler.emit.rules import literal, pruned
from service.schema_compiler.exact import is_whole, text_of
from service.schema_compiler.frontend.checked_schema import FIELD, CheckedSchema
from service.schema_compiler.lower.arrays import read_array
from service.schema_compiler.lower.context import MAX_ORDER_RULES, Context
from service.schema_compiler.lower.keyword_report import keyword_reports
from service.schema_compiler.lower.objects import read_object
from service.schema_compiler.normalize.bounds import (
    BEYOND,
    LADDER,
    LOOSE,
    MAX_COST,
    Bounds,
    TooCostly,
    cost,
)
from service.schema_compiler.normalize.constraints import Conjunction
from service.schema_compiler.normalize.literals import Emitted, Literal
from service.schema_compiler.normalize.nodes import (
    ANY,
    ARRAY,
    NUMBER,
    OBJECT,
    STRING,
    TYPES,
    Nodes,
    State,
)
from service.schema_compiler.report import KeywordReport, Rewrite
from service.types import PropertyOrder

ATTEMPT = 0.4
"""Of the time that is left, which one try may take. What is counted ends before, but on a machine
that is too busy."""
MAX_FORCED = 200_000
"""Characters that a grammar may force at once, so that they are used to decode faster."""
DECIMAL_MULTIPLES = "multiples of the decimal as written; validators on binary64 may disagree"
_LEVELS = 8192
"""Nesting of a value that refers to itself: each level takes a token of the answer."""
_NUMBER_LENGTH = 400
_FRACTION_DIGITS = 30
_MAX_INLINE = 60
"""Of an expression that is written wherever it is used. Compilers make rules of what is in brackets,
each time."""
_PATTERN_LENGTH = 20_000
"""More than a text that a pattern with a repeat can force."""


@dataclass(frozen=True, slots=True)
class SchemaGrammar:
    """The grammar of a schema as EBNF, and what it enforces."""

    ebnf: str
    keywords: tuple[KeywordReport, ...]
    rewrites: tuple[Rewrite, ...]
    forces_little: bool


@dataclass
class _Shape:
    """The values of a state: fixed expressions and composed ones.

    short, long: characters of a shortest text of some fixed expression, and of any.
    """

    fixed: list[str] = field(default_factory=list)
    composed: list[ObjectShape | ArrayShape] = field(default_factory=list)
    short: int | None = None
    long: int = 0

    def children(self) -> Iterable[State]:
        for shape in self.composed:
            yield from shape.children()

    def add(self, expression: str, length: int) -> None:
        self.fixed.append(expression)
        self.short = length if self.short is None else min(self.short, length)
        self.long = max(self.long, length)


def schema_grammar(
    compiled: CheckedSchema, text: str, order: PropertyOrder = PropertyOrder.DECLARED
) -> SchemaGrammar:
    """The grammar of a checked schema. text: the schema as sent.

    Raises ``GrammarError`` for a schema that no value fits, ``BudgetExceeded``.
    """
    for bounds, order_rules in _attempts(order):
        nodes = Nodes(compiled, text)
        builder = _Builder(nodes, bounds, order_rules)
        try:
            ebnf, little = builder.within_bounds()
        except TooCostly:
            continue
        return builder.result(ebnf, little)
    return _anything(compiled, text)


def _attempts(order: PropertyOrder) -> Iterable[tuple[Bounds, int | None]]:
    """Bounds to try, and the rules that any order may take; None keeps the declared order. What a
    schema says is never given up for the sake of any order."""
    if order is PropertyOrder.DECLARED:
        return [(bounds, None) for bounds in LADDER]
    return [(LADDER[0], MAX_ORDER_RULES), *((bounds, 0) for bounds in LADDER)]


def _anything(compiled: CheckedSchema, text: str) -> SchemaGrammar:
    """Any JSON, where nothing else is small enough."""
    nodes = Nodes(compiled, text)
    builder = _Builder(nodes, LOOSE)
    builder.context.give_up([nodes.node(nodes.places.root, "").atom], BEYOND)
    return builder.result(*builder.run(ANY))


class _Builder:
    def __init__(self, nodes: Nodes, bounds: Bounds, order_rules: int | None = None) -> None:
        self.nodes = nodes
        self.bounds = bounds
        self.context = Context(nodes, bounds, order_rules)
        self.shapes: dict[State, _Shape] = {}
        self.lengths: dict[State, int] = {}

    def within_bounds(self) -> tuple[str, bool]:
        """The grammar of the schema. Raises ``TooCostly``."""
        root = self.nodes.node(self.nodes.places.root, "")
        start = self.context.part([root.atom], "/additionalProperties")
        whole = budget.current()
        try:
            with budget.bounded(whole.part(ATTEMPT)):
                ebnf, little = self.run(start)
        except BudgetExceeded:
            raise TooCostly from None
        if cost(ebnf) > MAX_COST:
            raise TooCostly
        return ebnf, little

    def result(self, ebnf: str, little: bool) -> SchemaGrammar:
        """The grammar with the report on it."""
        context = self.context
        keywords = keyword_reports(self.nodes, context.dropped, context.given_up, context.remarks)
        return SchemaGrammar(ebnf, tuple(keywords), tuple(context.expander.rewrites), little)

    def run(self, start: State) -> tuple[str, bool]:
        """The grammar of the values of a state, and whether it forces no long text."""
        self._explore(start)
        self._find_values()
        if start not in self.lengths:
            raise GrammarError(
                FIELD,
                "no value can fit: its keywords contradict each other",
                reason="SCHEMA_UNSATISFIABLE",
                metadata={"pointer": ""},
            )
        order, recursive = self._order(start)
        expression = self._write(start, order, recursive)
        return pruned(self.context.rules.text(expression)), self._little(order, recursive)

    # States

    def _explore(self, start: State) -> None:
        # What is near the root comes first: that is what is kept where bounds are met.
        pending = deque([start])
        self.shapes[start] = _Shape()
        while pending:
            budget.current().check()
            state = pending.popleft()
            shape = self.shapes[state] = self._shape(state)
            for child in shape.children():
                if child not in self.shapes:
                    self.shapes[child] = _Shape()
                    pending.append(child)

    def _shape(self, state: State) -> _Shape:
        shape = _Shape()
        # Whoever asked for any value has noted what is not enforced in it.
        self.context.silent = not state
        place = min((self.nodes.of(atom).pointer for atom in state), key=len, default="")
        expansion = self.context.expand(state)
        for t in TYPES:
            if not expansion[t]:
                continue
            values, rest = self.context.listed(state, t, expansion[t])
            for value in values:
                for written in _texts(value):
                    shape.add(literal(written), len(written))
            for conjunction in rest:
                self._add(shape, t, conjunction, place)
        return shape

    def _add(self, shape: _Shape, t: int, conjunction: Conjunction, place: str) -> None:
        if t == OBJECT:
            found = read_object(self.context, conjunction, place)
            if found is not None:
                shape.composed.append(found)
        elif t == ARRAY:
            array = read_array(self.context, conjunction, place)
            if array is not None:
                shape.composed.append(array)
        else:
            literals = [c for c in conjunction if isinstance(c, Literal)]
            emitted = (
                self.context.string(literals) if t == STRING else self.context.number(literals)
            )
            self._note(literals, emitted)
            if emitted.expression is not None:
                length = _NUMBER_LENGTH if t == NUMBER else _string_length(literals)
                shape.add(emitted.expression, length)

    def _note(self, literals: list[Literal], emitted: Emitted) -> None:
        for one in literals:
            if one.keyword == "multipleOf" and not is_whole(one.value):
                self.context.note(one.pointer, DECIMAL_MULTIPLES)
        for dropped, why in emitted.dropped:
            self.context.drop(dropped.pointer, why)

    # Values

    def _find_values(self) -> None:
        """The least fixpoint of states that have a value, with the length of a short one."""
        pending = list(reversed(self.shapes))
        changed = True
        while changed:
            changed = False
            waiting = []
            for state in pending:
                budget.current().check()
                length = self._shortest(self.shapes[state])
                if length is None:
                    waiting.append(state)
                else:
                    self.lengths[state] = length
                    changed = True
            pending = waiting

    def _shortest(self, shape: _Shape) -> int | None:
        if shape.short is not None:
            return shape.short
        found = [one.shortest(self.lengths.get) for one in shape.composed]
        return min((length for length in found if length is not None), default=None)

    # Rules

    def _order(self, start: State) -> tuple[list[State], set[State]]:
        """States after their parts, and those that are parts of themselves."""
        order: list[State] = []
        recursive: set[State] = set()
        on_path = {start}
        seen = {start}
        stack = [(start, iter(self.shapes[start].children()))]
        while stack:
            state, children = stack[-1]
            child = next((c for c in children if c in self.lengths), None)
            if child is None:
                stack.pop()
                on_path.discard(state)
                order.append(state)
            elif child in on_path:
                recursive.add(child)
            elif child not in seen:
                seen.add(child)
                on_path.add(child)
                stack.append((child, iter(self.shapes[child].children())))
        return order, recursive

    def _write(self, start: State, order: list[State], recursive: set[State]) -> str:
        rules = self.context.rules
        names = {state: rules.reserve("value") for state in order if state in recursive}
        known: dict[State, str] = dict(names)
        self._find_common(order)
        for state in order:
            budget.current().check()
            shape = self.shapes[state]
            parts = [*shape.fixed]
            for one in shape.composed:
                expression = one.write(rules, known.get)
                if expression is not None:
                    parts.append(expression)
            body = " | ".join(dict.fromkeys(parts))
            if state in names:
                rules.fill(names[state], body)
            elif len(parts) == 1 and "(" not in body and len(body) < _MAX_INLINE:
                known[state] = body
            else:
                known[state] = rules.define("value", body)
        return known[start]

    def _find_common(self, order: list[State]) -> None:
        """Note members that several objects have."""
        objects = [o for s in order for o in self.shapes[s].composed if isinstance(o, ObjectShape)]
        counts = Counter((name, *ways) for one in objects for name, _, ways in one.members)
        for one in objects:
            several = (name for name, _, ways in one.members if counts[(name, *ways)] > 1)
            one.common = frozenset(several)

    def _little(self, order: list[State], recursive: set[State]) -> bool:
        """Whether the grammar forces no long text, by a safe estimate."""
        deepest: dict[State, float] = {}
        for state in order:
            shape = self.shapes[state]
            own = float(shape.long)
            for one in shape.composed:
                length = one.shortest(self.lengths.get)
                own = max(own, length or 0)
            below = max((deepest[c] for c in shape.children() if c in deepest), default=0.0)
            deepest[state] = own + below
            if state in recursive:
                deepest[state] *= _LEVELS
        return deepest[order[-1]] <= MAX_FORCED


def _texts(value: Any) -> Iterable[str]:
    """The texts of a listed value: as ``json.dumps`` writes it, and a fraction as in the schema."""
    yield text_of(value)
    if isinstance(value, Decimal) and abs(value.adjusted()) < _FRACTION_DIGITS:
        plain = f"{value:f}"
        if "." in plain and plain != text_of(value):
            yield plain


def _string_length(literals: list[Literal]) -> int:
    """Characters of a shortest string, about and not below."""
    length = 2
    for one in literals:
        if one.negated:
            length += 12
        elif one.keyword == "minLength":
            length += int(min(one.value, MAX_FORCED))
        elif one.keyword == "pattern":
            length += _PATTERN_LENGTH if "{" in one.value else 2 * len(one.value)
        elif one.keyword == "format":
            length += 64
    return length
