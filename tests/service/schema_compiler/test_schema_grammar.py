"""Grammars of schemas against the validator: what they accept, and what they report."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import check_texts, check_value

LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))


texts = given(st.sampled_from(schemas.FAMILIES).flatmap(schemas.schemas), st.integers(0, 1000))
values = given(
    st.sampled_from(schemas.FAMILIES).flatmap(
        lambda family: st.tuples(schemas.schemas(family), schemas.families(family))
    )
)


@pytest.mark.slow
@settings(LOOSE, max_examples=20)
@texts
def test_texts_of_the_grammar_are_valid(schema: Any, seed: int) -> None:
    check_texts(schema, seed)


@pytest.mark.slow
@settings(LOOSE, max_examples=30)
@values
def test_valid_values_are_texts_of_the_grammar(both: tuple[Any, Any]) -> None:
    check_value(*both)


@pytest.mark.slow
@settings(LOOSE, max_examples=400)
@texts
def test_texts_of_many_grammars_are_valid(schema: Any, seed: int) -> None:
    check_texts(schema, seed)


@pytest.mark.slow
@settings(LOOSE, max_examples=600)
@values
def test_many_valid_values_are_texts_of_their_grammars(both: tuple[Any, Any]) -> None:
    check_value(*both)
