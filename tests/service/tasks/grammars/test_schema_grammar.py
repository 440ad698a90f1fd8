"""Grammars of schemas against the validator: what they accept, and what they report."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.errors import GrammarError, OutputInvalid
from service.tasks import jsontext
from service.tasks.answers import AnswerValidator
from service.tasks.grammars.analysis import analyse
from service.tasks.grammars.report import Analysed
from service.tasks.schema import DEFAULT_LIMITS, check_json_schema
from service.types import Grammar, GrammarKind
from tests.service.tasks.grammars import schemas

REPEATS = "may repeat"
LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))


def analysed(schema: Any) -> Analysed | None:
    """None where the schema is refused; of schemas that no value fits, there is no grammar."""
    try:
        return analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), DEFAULT_LIMITS)
    except GrammarError as error:
        if error.reason not in ("SCHEMA_UNSATISFIABLE", "SCHEMA_INVALID", "SCHEMA_UNSUPPORTED"):
            raise
        return None


def admitted(schema: Any) -> bool:
    try:
        check_json_schema(json.dumps(schema))
    except GrammarError:
        return False
    return True


def valid(schema: Any, text: str) -> bool:
    try:
        AnswerValidator(json.dumps(schema)).parse(text)
    except OutputInvalid:
        return False
    return True


def check_texts(schema: Any, seed: int, number: int = 8) -> None:
    """Texts of the grammar are JSON, and valid unless the report says what may be violated."""
    found = analysed(schema)
    if found is None:
        return
    compiled = schemas.compiled(found.grammar.ebnf)
    checked = found.report.checked
    hard = [one for one in checked if REPEATS not in one.why]
    rng = random.Random(seed)
    for _ in range(number):
        text = schemas.walk(compiled, rng)
        if text is None or hard:
            continue
        if any(REPEATS in one.why for one in checked):
            try:
                jsontext.decode(text)
            except jsontext.JsonTextError as error:
                if "duplicate key" in str(error):
                    continue
                raise
        event("a valid text")
        assert valid(schema, text), (text, found.grammar.ebnf)


def check_value(schema: Any, value: Any) -> None:
    """A valid value is one of the grammar."""
    if not admitted(schema) or not valid(schema, json.dumps(value)):
        return
    event("a valid value")
    found = analysed(schema)
    assert found is not None, "no value fits, it says"
    compiled = schemas.compiled(found.grammar.ebnf)
    assert schemas.accepts_value(compiled, value), found.grammar.ebnf


@LOOSE
@given(st.sampled_from(schemas.FAMILIES).flatmap(schemas.schemas), st.integers(0, 1000))
def test_texts_of_the_grammar_are_valid(schema: Any, seed: int) -> None:
    check_texts(schema, seed)


@LOOSE
@given(
    st.sampled_from(schemas.FAMILIES).flatmap(
        lambda family: st.tuples(schemas.schemas(family), schemas.families(family))
    )
)
def test_valid_values_are_texts_of_the_grammar(both: tuple[Any, Any]) -> None:
    check_value(*both)
