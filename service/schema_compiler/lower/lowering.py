"""The lowering of a whole schema: from the states of its values to a document of ``ir``.

Two passes, without recursion, since references can chain as long as a schema is: the states that can be
reached from the root, nearest first, each with its alternatives; then the states that have a value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from service.errors import GrammarError
from service.schema_compiler import budget
from service.schema_compiler.exact import is_whole
from service.schema_compiler.frontend.checked_schema import FIELD, CheckedSchema
from service.schema_compiler.ir.sizes import can_last, forced_text, pruned, short_lengths
from service.schema_compiler.ir.values import (
    Alternative,
    Document,
    Number,
    Object,
    Reference,
    String,
    TextSet,
    references,
)
from service.schema_compiler.lower.arrays import lower_array
from service.schema_compiler.lower.compile_time import MAX_MS, document_ms
from service.schema_compiler.lower.constants import constants, in_any_order
from service.schema_compiler.lower.context import Context
from service.schema_compiler.lower.keyword_report import keyword_reports
from service.schema_compiler.lower.left_lengths import LeftLengths
from service.schema_compiler.lower.objects import LAST_COUNTS, LASTS, lower_object
from service.schema_compiler.lower.string_constraints import StringConstraints
from service.schema_compiler.normalize.alternatives import Expansion, is_list
from service.schema_compiler.normalize.bounds import BEYOND, EXACT, LOOSE, Bounds
from service.schema_compiler.normalize.constraints import Alternatives, Conjunction, Literal
from service.schema_compiler.normalize.nodes import (
    ANY,
    ARRAY,
    NUMBER,
    OBJECT,
    STRING,
    TYPES,
    Nodes,
)
from service.schema_compiler.report import KeywordReport, Rewrite

DECIMAL_MULTIPLES = "multiples of the decimal as written; validators on binary64 may disagree"
_MAX_LENGTH = 200_000
"""Characters beyond which the length of a text makes no difference."""
_PATTERN_LENGTH = 20_000
"""More than a text that a pattern with a repeat can force."""


@dataclass(frozen=True, slots=True)
class LoweredSchema:
    """The values of a schema, and which of its keywords they enforce.

    forced_text: a bound on the characters that a grammar for the values can force in a row.
    """

    document: Document
    keywords: tuple[KeywordReport, ...]
    rewrites: tuple[Rewrite, ...]
    forced_text: float


def lower_schema(
    checked: CheckedSchema,
    text: str,
    bounds: Bounds,
    order_rules: int | None,
    counted: frozenset[str] | None = None,
) -> LoweredSchema:
    """The values of a schema. text: as sent. order_rules: that may be used for properties in any order;
    None: properties come in the declared order. counted: pointers of the lengths of strings that the
    grammar counts, while the decoder counts the others; None: the grammar counts all.

    Raises ``GrammarError`` for a schema that no value satisfies, ``TooCostly`` where the schema needs
    other bounds, ``BudgetExceeded``.
    """
    lowering = _Lowering(Nodes(checked, text), bounds, order_rules, counted)
    root = lowering.nodes.node(lowering.nodes.subschemas.root, "")
    lowered = lowering.run(lowering.context.part([root.atom]))
    # Patterns that are looked at on the way may be in no grammar, so they count only now.
    if bounds.patterns_ms <= MAX_MS or document_ms(lowered.document) <= MAX_MS:
        return lowered
    if bounds.overlaps and lowering.context.has_overlaps:
        bounds = replace(bounds, overlaps=False)
    else:
        bounds = replace(bounds, overlaps=True, patterns_ms=MAX_MS)
    return lower_schema(checked, text, bounds, order_rules, counted)


def lower_to_anything(checked: CheckedSchema, text: str) -> LoweredSchema:
    """All JSON values, with the report that no keyword of the schema is enforced."""
    lowering = _Lowering(Nodes(checked, text), LOOSE, None)
    root = lowering.nodes.node(lowering.nodes.subschemas.root, "")
    lowering.context.give_up([root.atom], BEYOND)
    return lowering.run(lowering.context.reference(ANY))


def normalized(checked: CheckedSchema, text: str) -> list[tuple[tuple[str, ...], Expansion]]:
    """The alternatives by type of each state that can be reached, the root first. A state is named by
    the pointers of its subschemas, with ``not`` before those that a value violates.

    For people who look at the stages of the compiler; the lowering expands states as it needs them.
    """
    lowering = _Lowering(Nodes(checked, text), EXACT, None)
    nodes, context = lowering.nodes, lowering.context
    root = nodes.node(nodes.subschemas.root, "")
    lowering.run(context.part([root.atom]))
    states = [context.states[reference] for reference in lowering.values]
    return [
        (tuple(nodes.name(atom) for atom in sorted(state)), context.expand(state))
        for state in states
    ]


class _Lowering:
    def __init__(
        self,
        nodes: Nodes,
        bounds: Bounds,
        order_rules: int | None,
        counted: frozenset[str] | None = None,
    ) -> None:
        self.nodes = nodes
        self.context = Context(nodes, bounds, order_rules, counted)
        self.values: dict[Reference, tuple[Alternative, ...]] = {}

    def run(self, root: Reference) -> LoweredSchema:
        """The document with the report on it."""
        self._explore(root)
        lengths = short_lengths(self.values)
        if root not in lengths:
            raise GrammarError(
                FIELD,
                "no value can fit: its keywords contradict each other",
                reason="SCHEMA_UNSATISFIABLE",
                metadata={"pointer": ""},
            )
        document = self._with_lasting(pruned(root, self.values, lengths))
        context = self.context
        keywords = keyword_reports(self.nodes, context.dropped, context.given_up, context.remarks)
        rewrites = tuple(context.expander.rewrites)
        return LoweredSchema(document, tuple(keywords), rewrites, forced_text(document, lengths))

    def _with_lasting(self, document: Document) -> Document:
        """Without obligations that are to last where no object could meet them all then."""
        values = dict(document.values)
        for reference, alternatives in values.items():
            if any(isinstance(one, Object) and one.lasting for one in alternatives):
                values[reference] = tuple(map(self._lasting, alternatives))
        return replace(document, values=values)

    def _lasting(self, one: Alternative) -> Alternative:
        if not isinstance(one, Object) or not one.lasting:
            return one
        lasts = can_last(one)
        for pointer in one.lasting_by:
            if lasts:
                self.context.remark(pointer, LASTS)
            else:
                self.context.drop(pointer, LAST_COUNTS)
        return one if lasts else replace(one, lasting=0, lasting_by=())

    def _explore(self, root: Reference) -> None:
        # Values near the root come first: they keep their constraints where bounds are met.
        pending = deque([root])
        self.values[root] = ()
        while pending:
            budget.current().check()
            reference = pending.popleft()
            found = self.values[reference] = self._alternatives(reference)
            for child in (child for one in found for child in references(one)):
                if child not in self.values:
                    self.values[child] = ()
                    pending.append(child)

    def _alternatives(self, reference: Reference) -> tuple[Alternative, ...]:
        """The alternatives of a value, those of objects and arrays last."""
        if reference in self.context.constants:
            return tuple(in_any_order(self.context, self.context.constants[reference]))
        state = self.context.states[reference]
        expansion = self.context.expand(state)
        scalars: list[Alternative] = []
        composed: list[Alternative] = []
        for t in TYPES:
            if not expansion[t]:
                continue
            values, rest = self.context.listed(state, t, expansion[t])
            scalars += constants(self.context, values, _listing(expansion[t]))
            for conjunction in rest:
                found = self._alternative(t, conjunction)
                if found is not None:
                    (composed if t in (OBJECT, ARRAY) else scalars).append(found)
        return (*scalars, *composed)

    def _alternative(self, t: int, conjunction: Conjunction) -> Alternative | None:
        if t == OBJECT:
            return lower_object(self.context, conjunction)
        if t == ARRAY:
            return lower_array(self.context, conjunction)
        literals = [c for c in conjunction if isinstance(c, Literal)]
        if t == STRING:
            string = self.context.string(literals)
            self._report(string.dropped)
            if string.found is None:
                return None
            return _string(string.found, literals, self.context.left_lengths(literals))
        assert t == NUMBER
        for one in literals:
            if one.keyword == "multipleOf" and not is_whole(one.value):
                self.context.note(one.pointer, DECIMAL_MULTIPLES)
        number = self.context.number(literals)
        self._report(number.dropped)
        return None if number.found is None else Number(number.found)

    def _report(self, dropped: Iterable[tuple[Literal, str]]) -> None:
        for one, why in dropped:
            self.context.drop(one.pointer, why)


def _listing(alternatives: Alternatives) -> list[str]:
    """Pointers of the keywords that list values."""
    constraints = (one for conjunction in alternatives for one in conjunction)
    return [one.pointer for one in constraints if isinstance(one, Literal) and is_list(one)]


def _string(texts: TextSet, literals: list[Literal], left: LeftLengths) -> String:
    bounds = StringConstraints()
    for one in literals:
        if one.keyword in ("minLength", "maxLength"):
            bounds.add(one)
    highs = [high for high in (bounds.high, left.maximum) if high is not None]
    return String(
        texts,
        _length(literals),
        max(bounds.low, left.minimum),
        min(highs, default=None),
        tuple(literals[i].pointer for i in left.minimum_by),
        tuple(literals[i].pointer for i in left.maximum_by),
        left.automaton,
    )


def _length(literals: list[Literal]) -> int:
    """Characters of a short string, an approximation that never underestimates."""
    length = 2
    for one in literals:
        if one.negated:
            length += 12
        elif one.keyword == "minLength":
            length += int(min(one.value, _MAX_LENGTH))
        elif one.keyword == "pattern":
            length += _PATTERN_LENGTH if "{" in one.value else 2 * len(one.value)
        elif one.keyword == "format":
            length += 64
    return length
