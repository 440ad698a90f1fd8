"""Every keyword of every draft, by hand: ``jsonschema``, the final validation and the grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from service.tasks import schema as schemas_of_callers
from service.tasks.grammars.report import Enforcement
from service.tasks.keywords import DRAFTS
from tests.service.tasks.grammars import schemas
from tests.service.tasks.grammars.agreement import REPEATS, analysed, valid
from tests.service.tasks.grammars.cases import CASES, EVERY, Case

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
EACH = [
    pytest.param(
        case, draft, id=f"{case.keyword}-{DRAFTS[draft].name}-{number}",
        marks=() if draft == case.drafts[0] else pytest.mark.slow,
    )
    for number, case in enumerate(CASES)
    for draft in case.drafts
]  # fmt: skip


def asserting(draft: str) -> set[str]:
    """The keywords of a draft that say something about a value."""
    known = set(DRAFTS[draft].validator.VALIDATORS)
    known |= {"then", "else"} if "if" in known else set()
    known |= {"minContains", "maxContains"} if "dependentRequired" in known else set()
    return known | {"exclusiveMinimum", "exclusiveMaximum"}  # flags in draft-04


def of_draft(case: Case, draft: str) -> Any:
    return {"$schema": draft, **case.schema}


@pytest.mark.parametrize("draft", EVERY)
def test_every_keyword_of_a_draft_has_a_case(draft: str) -> None:
    assert asserting(draft) <= {case.keyword for case in CASES if draft in case.drafts}


def test_every_keyword_that_holds_schemas_has_a_case() -> None:
    known = {*schemas_of_callers._ONE, *schemas_of_callers._MANY, *schemas_of_callers._NAMED}
    assert known | set(schemas_of_callers._REFERENCES) <= {case.keyword for case in CASES}


@pytest.mark.parametrize(("case", "draft"), EACH)
def test_the_table_is_right(case: Case, draft: str) -> None:
    plain = jsonschema.validators.validator_for({"$schema": draft})
    if case.keyword in DRAFTS[draft].validator.VALIDATORS and case.keyword not in plain.VALIDATORS:
        assert (
            case.keyword == "dependencies"
        )  # that later drafts keep, here and in their metaschemas
        plain = jsonschema.Draft7Validator
    validator = plain(of_draft(case, draft), format_checker=FORMATS)
    validator.check_schema(of_draft(case, draft))
    assert all(validator.is_valid(value) for value in case.fits)
    assert not any(validator.is_valid(value) for value in case.not_fits)


@pytest.mark.parametrize(("case", "draft"), EACH)
def test_answers_are_judged_as_in_the_table(case: Case, draft: str) -> None:
    for value in case.fits:
        assert valid(of_draft(case, draft), json.dumps(value)), value
    for value in case.not_fits:
        assert not valid(of_draft(case, draft), json.dumps(value)), value


@pytest.mark.parametrize(("case", "draft"), EACH)
def test_the_grammar_says_the_same(case: Case, draft: str) -> None:
    found = analysed(of_draft(case, draft))
    assert found is not None
    checked = {one.keyword for one in found.report.checked if REPEATS not in one.why}
    assert checked == set(case.checked)
    said = {one.enforcement for one in found.report.keywords if one.keyword == case.keyword}
    assert (said == {Enforcement.ANNOTATION}) == (case.keyword not in asserting(draft))
    grammar = schemas.compiled(found.grammar.ebnf)
    for value in case.fits:
        assert schemas.accepts_value(grammar, value), value
    for value in () if case.checked else case.not_fits:
        assert not schemas.accepts_value(grammar, value), value
