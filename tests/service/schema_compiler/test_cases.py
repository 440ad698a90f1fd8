"""Every keyword of every draft, by hand: ``jsonschema``, the final validation and the grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from benchmarks import judge
from service.schema_compiler.frontend.drafts import DRAFTS
from service.schema_compiler.frontend.keywords import KEYWORDS, REFERENCES
from service.schema_compiler.report import Enforcement, WarningKind
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import analysed, valid
from tests.service.schema_compiler.cases import CASES, EVERY, FOURTH, NEWEST, SECOND, Case

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
    known = DRAFTS[draft].known | {"then", "else", "minContains", "maxContains"}
    return set(known) - DRAFTS[draft].newer - ({"additionalItems"} if draft == NEWEST else set())


def of_draft(case: Case, draft: str) -> Any:
    return {"$schema": draft, **case.schema}


def uses(schema: Any, keyword: str) -> bool:
    return f'"{keyword}"' in json.dumps(schema)


def whole_sizes(schema: Any) -> bool:
    return ".0" not in json.dumps(schema)


NEWER = [
    pytest.param(case, draft, id=f"{case.keyword}-{DRAFTS[draft].name}-{number}",
                 marks=() if draft == case.drafts[-1] or draft == FOURTH else pytest.mark.slow)
    for number, case in enumerate(CASES)
    for draft in EVERY
    if case.keyword in DRAFTS[draft].newer and not uses(case.schema, "$dynamicRef")
    and (whole_sizes(case.schema) or draft != FOURTH)
]  # fmt: skip
"""Keywords in drafts that are older than they are."""
UNNAMED = [
    pytest.param(case, id=f"{case.keyword}-{number}")
    for number, case in enumerate(CASES)
    if NEWEST not in case.drafts and case.keyword not in ("$ref", "$recursiveRef")
]
"""Forms that only older drafts have, in schemas that name none."""


def test_newer_keywords_are_those_of_later_drafts() -> None:
    assert {case.values[0].keyword for case in NEWER} == DRAFTS[FOURTH].newer  # type: ignore[union-attr]
    assert DRAFTS[SECOND].newer == {"prefixItems"}
    assert DRAFTS[NEWEST].newer == frozenset()
    for draft in EVERY:
        assert DRAFTS[draft].newer.isdisjoint(
            jsonschema.validators.validator_for({"$schema": draft}).VALIDATORS
        )


@pytest.mark.parametrize(("case", "draft"), NEWER)
def test_a_newer_keyword_takes_effect(case: Case, draft: str) -> None:
    """As the draft that has it says, in the final validation and in the grammar, and it is said."""
    later = jsonschema.validators.validator_for({"$schema": case.drafts[0]})(case.schema)
    agrees(case, of_draft(case, draft), later)
    found = analysed(of_draft(case, draft))
    assert found is not None
    said = [one for one in found.report.warnings if one.kind is WarningKind.OTHER_DRAFT]
    assert any(one.message.startswith(f"{case.keyword} is newer than") for one in said)


@pytest.mark.parametrize("case", UNNAMED)
def test_a_schema_that_names_no_draft_may_use_older_forms(case: Case) -> None:
    older = jsonschema.validators.validator_for({"$schema": case.drafts[-1]})(case.schema)
    agrees(case, case.schema, older)


def agrees(case: Case, schema: Any, library: Any) -> None:
    """The library, the final validation and the grammar judge the values of a case alike."""
    found = analysed(schema)
    assert found is not None
    assert {one.keyword for one in found.report.checked} == {*case.checked}
    grammar = schemas.compiled(found.grammar.ebnf)
    for value in case.fits:
        assert library.is_valid(value)
        assert valid(schema, json.dumps(value)), value
        assert schemas.accepts_value(grammar, value), value
    for value in case.not_fits:
        assert not library.is_valid(value)
        assert not valid(schema, json.dumps(value)), value
        assert case.checked or not schemas.accepts_value(grammar, value), value


@pytest.mark.parametrize("draft", EVERY)
def test_every_keyword_of_a_draft_has_a_case(draft: str) -> None:
    assert asserting(draft) <= {case.keyword for case in CASES if draft in case.drafts}


def test_every_keyword_that_holds_schemas_has_a_case() -> None:
    known = {name for name, keyword in KEYWORDS.items() if keyword.applies is not None}
    assert known | set(REFERENCES) <= {case.keyword for case in CASES}


@pytest.mark.parametrize(("case", "draft"), EACH)
def test_the_table_is_right(case: Case, draft: str) -> None:
    plain = jsonschema.validators.validator_for({"$schema": draft})
    if case.keyword == "dependencies" and case.keyword not in plain.VALIDATORS:
        plain = jsonschema.Draft7Validator  # later drafts keep it, here and in their metaschemas
    schema = judge.exact(json.dumps(of_draft(case, draft)))
    validator = judge.on_fractions(plain)(schema, format_checker=FORMATS)
    validator.check_schema(of_draft(case, draft))
    assert all(validator.is_valid(judge.exact(json.dumps(value))) for value in case.fits)
    assert not any(validator.is_valid(judge.exact(json.dumps(value))) for value in case.not_fits)


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
    checked = {one.keyword for one in found.report.checked}
    assert checked == set(case.checked)
    said = {one.enforcement for one in found.report.keywords if one.keyword == case.keyword}
    assert (said == {Enforcement.ANNOTATION}) == (case.keyword not in asserting(draft))
    grammar = schemas.compiled(found.grammar.ebnf)
    for value in case.fits:
        assert schemas.accepts_value(grammar, value), value
    for value in () if case.checked else case.not_fits:
        assert not schemas.accepts_value(grammar, value), value
