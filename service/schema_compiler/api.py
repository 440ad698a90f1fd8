"""The entry points of the compiler.

``compile_schema`` compiles a JSON schema. ``analyse`` does so for all kinds of grammars of the service:
JSON schemas, regular expressions, choices and EBNF.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import GrammarError
from service.schema_compiler import budget, jsontext
from service.schema_compiler.budget import Budget, BudgetExceeded, bounded
from service.schema_compiler.cache import SingleFlightCache
from service.schema_compiler.emit.cost import MAX_COST, cost
from service.schema_compiler.emit.grammar import choice_grammar, grammar_of, text_grammar
from service.schema_compiler.emit.length_plan import length_plan
from service.schema_compiler.emit.portable import portable
from service.schema_compiler.emit.string_lengths import StringLengths, string_lengths
from service.schema_compiler.frontend import closing, schema_warnings
from service.schema_compiler.frontend.checked_schema import FIELD, CheckedSchema, checked_schema
from service.schema_compiler.grammar_checks import check_grammar
from service.schema_compiler.ir.values import Document
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.lower.context import MAX_ORDER_RULES
from service.schema_compiler.lower.lowering import LoweredSchema, lower_schema, lower_to_anything
from service.schema_compiler.lower.strings import lower_regex
from service.schema_compiler.normalize.alternatives import TOO_MANY
from service.schema_compiler.normalize.bounds import EXACT, LADDER, WIDE, Bounds, TooCostly
from service.schema_compiler.prompt_schema import prompt_schema
from service.schema_compiler.report import Analysed, Enforcement, GrammarReport
from service.types import Grammar, GrammarKind, PropertyOrder

ANALYSIS_SECONDS = 5.0
"""Processor time of one analysis at most; schemas in use take some thousandths of a second."""
ANALYSIS_STEPS = 200_000_000
"""Steps of regular expressions in one analysis."""
ATTEMPT = 0.4
"""Share of the remaining time that one attempt may take. Attempts end before, by bounds that are
counted, unless the processor is very slow."""
MAX_FORCED = 200_000
"""Characters that a grammar may force in a row, so that they are used to decode faster."""
_CACHE: SingleFlightCache[Analysed] = SingleFlightCache(128, max_characters=8 << 20)


@dataclass(frozen=True, slots=True)
class Options:
    """How a schema is compiled."""

    property_order: PropertyOrder = PropertyOrder.DECLARED
    close_objects: bool = False
    lengths_beside: bool = False
    """The decoder counts lengths of strings, by the table of the compiled schema. Otherwise the grammar
    counts them, up to 64."""


@dataclass(frozen=True, slots=True)
class CompiledSchema:
    """A compiled JSON schema.

    schema: that answers have to fit: as sent, or with its objects closed. grammar: EBNF for xgrammar.
    report: on each keyword. document: the values that the grammar describes.
    forced_text: a bound on the characters that the grammar can force in a row. lengths: the table of
    ``emit/length_plan.py``, which the decoder has to keep; empty if the grammar says everything.
    """

    schema: str
    grammar: str
    report: GrammarReport
    document: Document
    forced_text: float
    lengths: bytes = b""

    @property
    def string_lengths(self) -> StringLengths:
        """The bounds on the lengths of strings, of which the grammar keeps only small ones."""
        return string_lengths(self.document)


def compile_schema(
    text: str, limits: SchemaLimits = DEFAULT_LIMITS, options: Options = Options()
) -> CompiledSchema:
    """Compile a JSON schema.

    Raises ``GrammarError`` on the field ``grammar.json_schema`` for a schema that is not valid, is over
    the limits, or that no value satisfies.
    """
    begun = time.perf_counter()
    checked = checked_schema(text, limits)
    try:
        with bounded(Budget(ANALYSIS_SECONDS, ANALYSIS_STEPS)):
            objects = closing.open_objects(checked)
            if options.close_objects and any(not one.why_not for one in objects):
                text = closing.closed(checked, objects, limits)
                checked = checked_schema(text, limits)
            lowered, ebnf, lengths = lowered_and_emitted(checked, text, options)
            warnings = schema_warnings.find(checked)
    except BudgetExceeded:
        what = "takes too long to analyse; make it smaller, or its alternatives fewer"
        raise GrammarError(FIELD, what, reason="SCHEMA_TOO_LARGE") from None
    weakened = any(one.enforcement is Enforcement.CHECKED for one in lowered.keywords)
    is_closed = options.close_objects
    report = GrammarReport(
        Enforcement.CHECKED if weakened else Enforcement.ENFORCED,
        tuple(closing.remarked(lowered.keywords, objects, is_closed=is_closed)),
        (*(closing.rewrites(objects) if is_closed else ()), *lowered.rewrites),
        len(ebnf.encode()),
        time.perf_counter() - begun,
        warnings=warnings,
    )
    return CompiledSchema(text, ebnf, report, lowered.document, lowered.forced_text, lengths)


def lowered_and_emitted(
    checked: CheckedSchema, text: str, options: Options
) -> tuple[LoweredSchema, str, bytes]:
    """The values of a checked schema, their grammar and the table of lengths beside it, with as few
    keywords dropped as the bounds on the size of a grammar allow. text: the schema as sent.

    Raises ``GrammarError`` for a schema that no value satisfies, ``BudgetExceeded``.
    """
    best: tuple[LoweredSchema, str, bytes] | None = None
    for bounds, order_rules in _attempts(options.property_order):
        # Wide bounds are for a grammar that could have more; the others, until there is one.
        has_grammar = best is not None
        if has_grammar != (bounds is WIDE):
            continue
        try:
            with bounded(budget.current().part(ATTEMPT)):
                if options.lengths_beside:
                    lowered, lengths = _uncounted(checked, text, bounds, order_rules)
                else:
                    lowered, lengths = lower_schema(checked, text, bounds, order_rules), b""
                ebnf = grammar_of(lowered.document)
        except (BudgetExceeded, TooCostly):
            continue
        if cost(ebnf) <= MAX_COST and (best is None or _drops(lowered) < _drops(best[0])):
            best = lowered, ebnf, lengths
        if best is not None and not _drops(best[0], TOO_MANY):
            break
    if best is not None:
        return best
    lowered = lower_to_anything(checked, text)
    return lowered, grammar_of(lowered.document), b""


def _drops(lowered: LoweredSchema, why: str = "") -> int:
    """How many keywords are only checked, for a reason that begins so."""
    checked = (one for one in lowered.keywords if one.enforcement is Enforcement.CHECKED)
    return sum(one.why.startswith(why) for one in checked)


def _uncounted(
    checked: CheckedSchema, text: str, bounds: Bounds, order_rules: int | None
) -> tuple[LoweredSchema, bytes]:
    """The values of a schema whose lengths of strings the decoder counts, and the table for it. The
    grammar counts those that the table cannot tell apart."""
    counted: frozenset[str] = frozenset()
    for _ in range(3):
        lowered = lower_schema(checked, text, bounds, order_rules, counted)
        plan = length_plan(lowered.document)
        if plan is None:
            break
        if not plan.looser:
            return lowered, plan.table
        counted |= plan.looser
    return lower_schema(checked, text, bounds, order_rules), b""


def _attempts(order: PropertyOrder) -> Iterable[tuple[Bounds, int | None]]:
    """Bounds to try, and the rules that any order may take; None keeps the declared order. What a
    schema says is never given up for the sake of any order."""
    if order is PropertyOrder.DECLARED:
        return [(bounds, None) for bounds in LADDER]
    return [*((bounds, MAX_ORDER_RULES) for bounds in (EXACT, WIDE)), *((one, 0) for one in LADDER)]


def analyse(grammar: Grammar, limits: SchemaLimits) -> Analysed:
    """Make a grammar ready for engines; one seen before costs a dictionary look-up.

    Raises ``GrammarError`` on a field at or below ``grammar`` for one that cannot be used.
    """
    order = grammar.property_order or PropertyOrder.DECLARED
    options = Options(order, bool(grammar.close_objects), grammar.lengths_beside)
    key = grammar.kind, grammar.source, options, limits
    return _CACHE.get(key, len(grammar.source), lambda: _analysed(*key))


def _analysed(kind: GrammarKind, source: str, options: Options, limits: SchemaLimits) -> Analysed:
    if kind is GrammarKind.JSON_SCHEMA:
        found = compile_schema(source, limits, options)
        grammar = Grammar(
            kind,
            found.schema,
            ebnf=found.grammar,
            forces_little=found.forced_text <= MAX_FORCED,
            property_order=options.property_order,
            close_objects=options.close_objects,
            prompt_schema=prompt_schema(found.schema, limits),
            lengths_beside=options.lengths_beside,
            lengths=found.lengths,
        )
        return Analysed(grammar, found.report)
    begun = time.perf_counter()
    plain = Grammar(kind, source)
    check_grammar(plain, limits)
    why = ""
    if kind is GrammarKind.CHOICE:
        ebnf, forces_little = choice_grammar(jsontext.decode(source)), True
    elif kind is GrammarKind.REGEX:
        lowered = lower_regex(source)
        if lowered.found is None:
            what = "no text can match it"
            raise GrammarError("grammar.regex", what, reason="GRAMMAR_UNSATISFIABLE")
        ebnf, forces_little = text_grammar(lowered.found), "{" not in source
        why = "; ".join(f"the expression {reason}" for _, reason in lowered.dropped)
    else:
        ebnf, forces_little = portable(source), False
    report = GrammarReport(
        Enforcement.CHECKED if why else Enforcement.ENFORCED,
        ebnf_bytes=len(ebnf.encode()),
        seconds=time.perf_counter() - begun,
        why=why,
    )
    return Analysed(Grammar(kind, source, ebnf, forces_little), report)
