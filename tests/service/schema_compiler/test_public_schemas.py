"""Schemas from the wild: every one is admitted or refused with a place, judged right, and compiled."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.engines.common.grammar import GrammarCompiler
from service.errors import GrammarError, OutputInvalid
from service.schema_compiler.frontend.checked_schema import check_json_schema
from service.structured_output.answers import AnswerValidator
from service.types import GrammarKind
from tests.service.analysed import analysed

COLLECTION = Path(__file__).parents[4] / "shared" / "maskbench" / "public.jsonl"
BY_THE_LETTER = {("Github_medium---o3385", 0), ("Github_medium---o3385", 3)}
"""Instances that are labelled as a validator of draft-04 judges them, which ignores ``if``. Here it
takes effect, as its author means, and they violate what is behind ``then``."""
HANG_S = 10.0
"""Far above what any of them takes; more is a hang."""

pytestmark = pytest.mark.skipif(
    not COLLECTION.is_file(), reason="the collection of public schemas is not there"
)


@functools.cache
def cases() -> list[dict[str, Any]]:
    return [json.loads(line) for line in COLLECTION.read_text().splitlines()]


def refusal(schema: Any) -> GrammarError | None:
    began = time.process_time()
    try:
        check_json_schema(json.dumps(schema))
    except GrammarError as error:
        return error
    finally:
        assert time.process_time() - began < HANG_S
    return None


def judge(schema: Any, value: Any) -> bool:
    try:
        AnswerValidator(json.dumps(schema)).parse(json.dumps(value))
    except OutputInvalid:
        return False
    return True


def misjudged(chosen: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Names of admitted schemas with the numbers of the instances that are not judged as labelled."""
    return [
        (case["name"], number)
        for case in chosen
        if refusal(case["schema"]) is None
        for number, test in enumerate(case["tests"])
        if judge(case["schema"], test["data"]) != test["valid"]
    ]


@pytest.mark.slow
def test_a_sample_is_judged_as_labelled() -> None:
    assert misjudged(cases()[::16]) == []


@pytest.mark.slow
def test_all_are_judged_as_labelled() -> None:
    assert sum(len(case["tests"]) for case in cases()) > 3000
    assert set(misjudged(cases())) == BY_THE_LETTER


@pytest.mark.slow
def test_who_is_refused_and_why() -> None:
    refused = {case["name"]: refusal(case["schema"]) for case in cases()}
    found = {name: error for name, error in refused.items() if error is not None}
    assert Counter(error.reason for error in found.values()) == {
        "SCHEMA_PATTERN_UNSUPPORTED": 2,  # a look-ahead that is too large, and one that is too long
    }
    for name, error in found.items():
        pointer = error.metadata["pointer"]
        assert pointer.rpartition("/")[2] == "pattern", name
        assert pointer in error.message, name


@pytest.mark.slow
def test_all_that_are_analysed_compile() -> None:
    """In the engine: nothing crashes or hangs, and xgrammar takes every grammar that is ours."""
    compiler = GrammarCompiler([bytes([i]) for i in range(256)] + [b""], [256])
    compiled = 0
    for case in cases():
        try:
            ready = analysed(GrammarKind.JSON_SCHEMA, json.dumps(case["schema"]))
        except GrammarError:
            continue  # has tests of its own
        began = time.process_time()
        compiler.compile(ready)
        assert time.process_time() - began < HANG_S, case["name"]
        compiled += 1
    assert compiled > 0.9 * len(cases())
