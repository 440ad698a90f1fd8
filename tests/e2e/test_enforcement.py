"""What is enforced, and another attempt at what is only checked, with the bundled model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import jsonschema
import pytest
import pytest_asyncio

from examples.drawings.evaluate import serving
from service.client import read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.wiring import BUNDLED_MODEL
from tests.service.harness import failure, inline, run_request

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

DIGITS = {
    "type": "array",
    "items": {"type": "string", "pattern": "^[0-9]$"},
    "minItems": 4,
    "maxItems": 4,
    "uniqueItems": True,
}
"""A grammar gives four digits; that they differ can only be checked."""
CLOSED = {
    "type": "object",
    "additionalProperties": False,
    "required": ["count"],
    "properties": {"count": {"type": "integer", "minimum": 3, "maximum": 40, "multipleOf": 7}},
}
CALLS = 24


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def stub() -> AsyncIterator[Any]:
    async with serving(BUNDLED_MODEL) as found:
        yield found


def digits(seed: int, **options: Any) -> pb.RunTaskRequest:
    task = inline("Name four digits.", json_schema=json.dumps(DIGITS))
    return run_request(task, temperature=2.0, seed=seed, max_tokens=64, **options)


async def outcome(stub: Any, seed: int) -> tuple[str, int]:
    """The text, or the reason of the error, and the attempts."""
    try:
        result = (await stub.RunTask(digits(seed), timeout=60)).result
    except grpc.aio.AioRpcError as error:
        found = read_error(error)
        return found.reason, int(found.metadata["attempts"])
    return result.text, result.attempts


async def test_answers_satisfy_enforced_keywords_of_reports(stub: Any) -> None:
    for schema, enforcement in (
        (CLOSED, pb.ENFORCEMENT_ENFORCED),
        (DIGITS, pb.ENFORCEMENT_CHECKED),
    ):
        grammar = pb.Grammar(json_schema=json.dumps(schema))
        request = pb.ValidateSchemaRequest(grammar=grammar)
        report = await stub.ValidateSchema(request, timeout=30)
        assert report.enforcement == enforcement
        assert report.grammar_bytes > 0
        again = await stub.ValidateSchema(request, timeout=30)
        assert again.compile_seconds < max(report.compile_seconds, 0.005)


async def test_strict_refuses_checked_schemas(stub: Any) -> None:
    """What passes is kept by the grammar alone, however adversarial the sampling."""
    task = inline("How many?", json_schema=json.dumps(CLOSED))
    for seed in range(8):
        request = run_request(task, temperature=2.0, seed=seed, max_tokens=64)
        request.strict = True
        result = (await stub.RunTask(request, timeout=60)).result
        jsonschema.validate(json.loads(result.json), CLOSED)
        assert (result.enforcement, result.attempts) == (pb.ENFORCEMENT_ENFORCED, 1)
    refused = digits(0)
    refused.strict = True
    assert (await failure(stub.RunTask(refused, timeout=60))).reason == "SCHEMA_NOT_ENFORCED"


async def test_invalid_answers_are_generated_again(stub: Any) -> None:
    """Nothing invalid is an answer; a second attempt helps; a seed decides all of it."""
    found = await asyncio.gather(*(outcome(stub, seed) for seed in range(CALLS)))
    assert await asyncio.gather(*(outcome(stub, seed) for seed in range(CALLS))) == found
    answers = [(text, attempts) for text, attempts in found if text != "OUTPUT_INVALID"]
    for text, _ in answers:
        jsonschema.validate(json.loads(text), DIGITS)
    assert all(attempts == 2 for text, attempts in found if text == "OUTPUT_INVALID")
    assert {attempts for _, attempts in answers} == {1, 2}
