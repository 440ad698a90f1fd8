"""Random ways through grammars: none of them ends where no text goes on, and no text of a grammar that
enforces every keyword is invalid."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.schema_compiler.jsontext import without_repeats
from service.schema_compiler.report import Enforcement
from service.types import PropertyOrder
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import _whole, analysed, valid
from tests.service.schema_compiler.cases import CASES, Case

LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))
MEMBERS: Any = (
    {"type": "integer"},
    {"type": "string"},
    {},
    {"enum": ["a", 1]},
    {"type": "object", "properties": {"x": {}, "y": {"type": "integer"}}, "required": ["y"]},
)
SCHEMAS = st.fixed_dictionaries(
    {
        "type": st.just("object"),
        "properties": st.dictionaries(
            st.sampled_from("abcd"), st.sampled_from(MEMBERS), min_size=2
        ),
    },
    optional={
        "additionalProperties": st.sampled_from((False, {"type": "integer"})),
        "required": st.lists(st.sampled_from("abc"), unique=True, max_size=2),
        "patternProperties": st.just({"^z": {"type": "integer"}}),
    },
)
VALUES = st.dictionaries(
    st.sampled_from("abcdez"), st.sampled_from((1, 1, "a", {"y": 1, "x": 2}, [])), min_size=2
)
OBJECTS = st.one_of(
    st.tuples(SCHEMAS, VALUES, st.integers(0, 1000)),
    st.tuples(schemas.schemas("object"), schemas.families("object"), st.integers(0, 1000)),
)


def walk_through(keyword: str, walks: int) -> None:
    """So many walks for a keyword, through the grammars of all its cases, in both orders.

    A walk asserts at each step that something goes on."""
    rng = random.Random(keyword)
    own: list[Case] = [case for case in CASES if case.keyword == keyword]
    grammars = []
    for case, order, beside in itertools.product(own, PropertyOrder, (False, True)):
        found = analysed(case.schema, order, lengths_beside=beside)
        if found is not None and (found.grammar.lengths or not beside):
            grammars.append((case, found, schemas.compiled(found.grammar.ebnf)))
    assert grammars
    ended = 0
    for number in range(walks):
        case, found, grammar = grammars[number % len(grammars)]
        text = schemas.walk(grammar, rng, lengths=found.grammar.lengths)
        if text is None:
            continue
        ended += 1
        json.loads(without_repeats(text))
        if found.report.enforcement is Enforcement.ENFORCED:
            assert valid(case.schema, text), (case.schema, text)
    assert ended > walks // 10 or keyword in ENDLESS, "most walks are too long to tell anything"


ENDLESS = {"definitions"}
"""Random choices nest its values ever deeper, so that its walks only show that something goes on."""
KEYWORDS = sorted({case.keyword for case in CASES} - {"$recursiveRef"})  # not of the default draft


@pytest.mark.slow
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_no_dead_end(keyword: str) -> None:
    walk_through(keyword, 40)


@pytest.mark.long
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_no_dead_end_in_2000_walks(keyword: str) -> None:
    walk_through(keyword, 2_000)


def check_any_order(schema: Any, value: Any, seed: int) -> None:
    """A valid document is written by the grammar as it is, with its names in whatever order and with names
    that begin with declared ones, unless the report says that an object keeps the declared order."""
    value = shuffled(_whole(value), random.Random(seed))
    if not isinstance(schema, dict):
        return
    found = analysed(schema, PropertyOrder.ANY)
    if found is None or not valid(schema, json.dumps(value)):
        return
    if any("order" in one.why for one in found.report.keywords):
        event("the declared order is kept")
        return
    event("a valid document")
    if isinstance(value, dict) and len(value) > 1:
        event("a valid document with several names")
    text = json.dumps(value, ensure_ascii=False)
    assert schemas.accepts(schemas.compiled(found.grammar.ebnf), text), (schema, text)


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, list):
        return [shuffled(one, rng) for one in value]
    if not isinstance(value, dict):
        return value
    names = list(value)
    rng.shuffle(names)
    return {name: shuffled(value[name], rng) for name in names}


@pytest.mark.slow
@settings(LOOSE, max_examples=150)
@given(OBJECTS)
def test_valid_documents_are_writable_in_any_order(drawn: tuple[Any, Any, int]) -> None:
    check_any_order(*drawn)


@pytest.mark.long
@settings(LOOSE, max_examples=5_000)
@given(OBJECTS)
def test_many_valid_documents_are_writable_in_any_order(drawn: tuple[Any, Any, int]) -> None:
    check_any_order(*drawn)
