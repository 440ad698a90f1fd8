"""What goes to the processes that analyse grammars, and comes back, is what was meant."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import FieldViolation, GrammarError
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import (
    Analysed,
    Enforcement,
    GrammarReport,
    KeywordReport,
    Rewrite,
    SchemaWarning,
    WarningKind,
)
from service.structured_output import wire
from service.types import Grammar, GrammarKind, PropertyOrder

TEXT = st.text(st.characters(exclude_categories=()))  # with half surrogates
NUMBERS = st.integers(0, 2**40)
GRAMMARS = st.builds(
    Grammar,
    st.sampled_from(GrammarKind),
    TEXT,
    property_order=st.none() | st.sampled_from(PropertyOrder),
    close_objects=st.none() | st.booleans(),
)
LIMITS = st.builds(SchemaLimits, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
KEYWORDS = st.builds(KeywordReport, TEXT, TEXT, st.sampled_from(Enforcement), TEXT)
REPORTS = st.builds(
    GrammarReport,
    st.sampled_from(Enforcement),
    st.lists(KEYWORDS, max_size=3).map(tuple),
    st.lists(st.builds(Rewrite, TEXT, TEXT), max_size=3).map(tuple),
    NUMBERS,
    st.floats(0, 100),
    TEXT,
    st.lists(st.builds(SchemaWarning, TEXT, st.sampled_from(WarningKind), TEXT), max_size=3).map(
        tuple
    ),
)
VIOLATIONS = st.builds(FieldViolation, TEXT, TEXT)


def sent(message: dict[str, object]) -> dict[str, object]:
    """A message after its way through a pipe."""
    data = wire.frame(message)
    (length,) = wire.LENGTH.unpack(data[: wire.LENGTH.size])
    assert length == len(data) - wire.LENGTH.size
    found: dict[str, object] = json.loads(data[wire.LENGTH.size :])
    return found


@given(GRAMMARS, LIMITS, st.floats(0, 100))
def test_requests(grammar: Grammar, limits: SchemaLimits, limit_s: float) -> None:
    message = sent(wire.write_request(grammar, limits, limit_s))
    assert wire.read_request(message) == (grammar, limits, limit_s)


@pytest.mark.slow
@given(GRAMMARS, TEXT, st.booleans(), REPORTS)
def test_analysed(grammar: Grammar, ebnf: str, little: bool, report: GrammarReport) -> None:
    analysed = Analysed(replace(grammar, ebnf=ebnf, forces_little=little), report)
    message = sent(wire.write_analysed(grammar, analysed))
    assert message["source"] is None, "the server has it"
    assert wire.read_answer(grammar, message) == analysed


@pytest.mark.slow
@given(GRAMMARS, TEXT, REPORTS)
def test_analysed_with_another_source(grammar: Grammar, source: str, report: GrammarReport) -> None:
    analysed = Analysed(replace(grammar, source=source), report)
    message = sent(wire.write_analysed(grammar, analysed))
    assert wire.read_answer(grammar, message) == analysed


@given(GRAMMARS, st.lists(VIOLATIONS, min_size=1, max_size=3), st.dictionaries(TEXT, TEXT))
def test_refusals(
    grammar: Grammar, violations: list[FieldViolation], metadata: dict[str, str]
) -> None:
    first, *more = violations
    error = GrammarError(
        first.field, first.description, reason="WHY", metadata=metadata, more=tuple(more)
    )
    found = wire.read_answer(grammar, sent(wire.write_refusal(error)))
    assert isinstance(found, GrammarError)
    assert found.message == error.message
    assert (found.violations, found.reason, found.metadata) == (tuple(violations), "WHY", metadata)


@pytest.mark.parametrize("message", [{}, {"ebnf": 7}, {"violations": []}, {"violations": 3}])
def test_an_answer_of_a_wrong_form_is_an_error(message: dict[str, object]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        wire.read_answer(Grammar(GrammarKind.REGEX, "a"), message)
