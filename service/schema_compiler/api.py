"""The analysis of a grammar of a caller: checks, the EBNF that engines compile, and a report."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache

from service.errors import GrammarError
from service.schema_compiler import jsontext
from service.schema_compiler.budget import Budget, BudgetExceeded, bounded
from service.schema_compiler.emit.portable import portable
from service.schema_compiler.emit.rules import Rules, literal, one_of, pruned
from service.schema_compiler.frontend import schema_warnings as mistakes
from service.schema_compiler.frontend.checked_schema import FIELD, compiled
from service.schema_compiler.grammar_checks import check_grammar
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.lower.schema_grammar import schema_grammar
from service.schema_compiler.lower.strings import emit_regex
from service.schema_compiler.report import Analysed, Enforcement, GrammarReport
from service.types import Grammar, GrammarKind, PropertyOrder

ANALYSIS_SECONDS = 5.0
"""Bound on one analysis; schemas in use take some thousandths."""
ANALYSIS_STEPS = 200_000_000
"""Steps of regular expressions in one analysis."""
_KEPT = 128
"""Analysed grammars that are kept."""


def analyse(grammar: Grammar, limits: SchemaLimits) -> Analysed:
    """Make a grammar ready for engines; one seen before costs a dictionary look-up.

    Raises ``GrammarError`` on a field at or below ``grammar`` for one that cannot be used.
    """
    order = grammar.property_order or PropertyOrder.DECLARED
    return _analysed(grammar.kind, grammar.source, order, limits)


@lru_cache(maxsize=_KEPT)
def _analysed(
    kind: GrammarKind, source: str, order: PropertyOrder, limits: SchemaLimits
) -> Analysed:
    begun = time.perf_counter()
    if kind is GrammarKind.JSON_SCHEMA:
        return _schema(Grammar(kind, source, property_order=order), limits, begun)
    plain = Grammar(kind, source)
    check_grammar(plain, limits)
    rules = Rules()
    why = ""
    if kind is GrammarKind.CHOICE:
        ebnf, little = rules.text(one_of(map(literal, jsontext.decode(source)))), True
    elif kind is GrammarKind.REGEX:
        emitted = emit_regex(source, rules)
        if emitted.expression is None:
            what = "no text can match it"
            raise GrammarError("grammar.regex", what, reason="GRAMMAR_UNSATISFIABLE")
        ebnf, little = pruned(rules.text(emitted.expression)), "{" not in source
        why = "; ".join(f"the expression {reason}" for _, reason in emitted.dropped)
    else:
        ebnf, little = portable(source), False
    report = GrammarReport(
        Enforcement.CHECKED if why else Enforcement.ENFORCED,
        ebnf_bytes=len(ebnf.encode()),
        seconds=time.perf_counter() - begun,
        why=why,
    )
    return Analysed(Grammar(kind, source, ebnf, little), report)


def _schema(grammar: Grammar, limits: SchemaLimits, begun: float) -> Analysed:
    checked = compiled(grammar.source, limits)
    try:
        with bounded(Budget(ANALYSIS_SECONDS, ANALYSIS_STEPS)):
            found = schema_grammar(
                checked, grammar.source, grammar.property_order or PropertyOrder.DECLARED
            )
            warnings = mistakes.find(checked)
    except BudgetExceeded:
        what = "takes too long to analyse; make it smaller, or its alternatives fewer"
        raise GrammarError(FIELD, what, reason="SCHEMA_TOO_LARGE") from None
    weakened = any(one.enforcement is Enforcement.CHECKED for one in found.keywords)
    report = GrammarReport(
        Enforcement.CHECKED if weakened else Enforcement.ENFORCED,
        found.keywords,
        found.rewrites,
        len(found.ebnf.encode()),
        time.perf_counter() - begun,
        warnings=warnings,
    )
    ready = replace(grammar, ebnf=found.ebnf, forces_little=found.forces_little)
    return Analysed(ready, report)
