"""Each rewrite is sound, and complete as far as the report says: random schemas of each kind, with
texts of their grammars and values near them, against the final validation and ``jsonschema``."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st

from tests.service.schema_compiler.agreement import admitted, check
from tests.service.schema_compiler.rewrites import (
    FOURTH,
    KINDS,
    NINETEENTH,
    SEVENTH,
    combined,
    of_draft,
)

LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))
randoms = st.randoms(use_true_random=False)


def agrees(kind: str, rng: random.Random) -> None:
    schema, values = KINDS[kind](rng)
    note(str(schema))
    check(schema, 0, values)


@pytest.mark.slow
@settings(LOOSE, max_examples=20)
@given(st.sampled_from(sorted(KINDS)), randoms)
def test_some_of_all_kinds(kind: str, rng: random.Random) -> None:
    agrees(kind, rng)


@pytest.mark.slow
@settings(LOOSE, max_examples=15)
@given(randoms)
def test_some_combinations(rng: random.Random) -> None:
    schema, values = combined(rng)
    note(str(schema))
    check(schema, 0, values)


@pytest.mark.slow
@settings(LOOSE, max_examples=400)
@given(randoms)
def test_many_combinations(rng: random.Random) -> None:
    schema, values = combined(rng)
    note(str(schema))
    check(schema, 0, values)


@pytest.mark.slow
@pytest.mark.parametrize("draft", [NINETEENTH, SEVENTH, FOURTH])
@settings(LOOSE, max_examples=150)
@given(st.sampled_from(sorted(KINDS)), randoms)
def test_older_drafts(draft: str, kind: str, rng: random.Random) -> None:
    schema, values = KINDS[kind](rng)
    assume("$schema" not in schema)
    schema = of_draft(schema, draft)
    assume(admitted(schema))
    note(str(schema))
    check(schema, 0, values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(LOOSE, max_examples=60)
@given(rng=randoms)
def test_many_of_each_kind(kind: str, rng: random.Random) -> None:
    agrees(kind, rng)
