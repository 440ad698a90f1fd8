"""Amounts of money through a real server: refused where they are no multiples of a cent, else given out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import failure, inline, run_request, running

CASE = Path(__file__).parents[3] / "shared" / "cases" / "schemas" / "d1-cents.json"
CENTS = {"type": "number", "multipleOf": 0.01}
INVOICE = {
    "type": "object",
    "properties": {
        "lines": {"type": "array", "items": CENTS},
        "rate": {"enum": [0.1, 1.0]},
        "total": {"type": "number", "multipleOf": 0.05, "minimum": 0.1, "exclusiveMaximum": 1e6},
    },
    "required": ["lines", "rate", "total"],
    "additionalProperties": False,
}


def amounts(chance: random.Random, number: int) -> list[str]:
    """Texts of amounts, made from integers of cents."""
    cents = [chance.randrange(10 ** chance.randrange(1, 8)) for _ in range(number)]
    return [f"{one // 100}.{one % 100:02}" for one in cents]


async def test_invoices_are_given_out_as_they_were_written() -> None:
    chance = random.Random(3)
    engine = FakeEngine()
    async with running(engine) as started:
        for _ in range(40):
            lines = ", ".join(amounts(chance, 50))
            nickels = chance.randrange(2, 10**6)
            total = f"{nickels // 20}.{nickels % 20 * 5:02}"
            rate = chance.choice(("0.1", "1", "1.0", "0.10"))
            text = f'{{"lines": [{lines}], "rate": {rate}, "total": {total}}}'
            engine.answer = text
            request = run_request(inline(json_schema=json.dumps(INVOICE)), max_tokens=4000)
            result = (await started.stub.RunTask(request, timeout=60)).result
            assert result.json == text
            assert result.enforcement == pb.ENFORCEMENT_ENFORCED


async def test_one_tenth_of_a_cent_is_found_among_amounts() -> None:
    chance = random.Random(4)
    engine = FakeEngine()
    async with running(engine) as started:
        for _ in range(40):
            lines = amounts(chance, 50)
            place = chance.randrange(50)
            lines[place] += str(chance.randrange(1, 10))
            engine.answer = f"[{', '.join(lines)}]"
            schema = json.dumps({"type": "array", "items": CENTS})
            request = run_request(inline(json_schema=schema), max_tokens=4000)
            error = await failure(started.stub.RunTask(request, timeout=60))
            assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "OUTPUT_INVALID")
            assert error.metadata["pointer"] == f"/{place}"
            assert error.metadata["keyword"] == "multipleOf"


async def reported(schema: Any) -> pb.ValidateSchemaResponse:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=text))
    async with running() as started:
        return await started.stub.ValidateSchema(request, timeout=60)


async def test_the_report_says_that_other_validators_may_disagree() -> None:
    found = await reported(INVOICE)
    assert found.enforcement == pb.ENFORCEMENT_ENFORCED
    notes = {one.pointer: one.what for one in found.rewrites}
    for pointer in ("/properties/lines/items/multipleOf", "/properties/total/multipleOf"):
        assert "validators on binary64 may disagree" in notes[pointer]
    found = await reported({"type": "number", "multipleOf": 3})
    assert not found.rewrites


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "number", "multipleOf": 1e-999999999}',
        '{"type": "integer", "multipleOf": 1e-999999999}',
        '{"type": "number", "minimum": 1e-999999999, "maximum": 1e-9999}',
        '{"type": "number", "exclusiveMinimum": -1e-999999999, "multipleOf": 0.01, "maximum": 1}',
        '{"type": "number", "multipleOf": 0.01, "minimum": 0.001, "maximum": 3.00000000000000000001}',
        '{"enum": [1e-999999999, 1e300, 123456789012345678901234567890.5]}',
        '{"type": "number", "not": {"enum": [1e-999999999, 1e300]}}',
        '{"type": "number", "multipleOf": 12345678.9, "maximum": 1e300}',
        '{"type": "integer", "multipleOf": 1e300, "minimum": 1}',
    ],
)
async def test_schemas_with_extreme_numbers_are_answered(schema: str) -> None:
    found = await reported(schema)
    for one in found.keywords:
        assert one.enforcement != pb.ENFORCEMENT_CHECKED or one.reason


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ('{"maximum": 1e400}', "is not JSON: a number is too large"),
        ('{"maximum": 1e-99999999999999999999}', "is not JSON: a number is too small"),
        ('{"multipleOf": 0.' + "1" * 5000 + "}", "is not JSON: a number has too many digits"),
        ('{"multipleOf": 0.0}', "must satisfy exclusiveMinimum"),
    ],
)
async def test_schemas_with_numbers_that_cannot_be_read_are_refused(schema: str, why: str) -> None:
    request = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=schema))
    async with running() as started:
        error = await failure(started.stub.ValidateSchema(request, timeout=60))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert why in next(iter(error.fields.values()))


@pytest.mark.skipif(not CASE.is_file(), reason="the case of amounts is not there")
async def test_the_case_of_amounts() -> None:
    case = json.loads(CASE.read_text())
    engine = FakeEngine()
    async with running(engine) as started:
        for text in map(json.dumps, case["valid"]):
            engine.answer = text
            request = run_request(inline(json_schema=json.dumps(case["schema"])))
            result = (await started.stub.RunTask(request, timeout=60)).result
            assert (result.json, result.enforcement) == (text, pb.ENFORCEMENT_ENFORCED)
        for text in map(json.dumps, case["invalid"]):
            engine.answer = text
            request = run_request(inline(json_schema=json.dumps(case["schema"])))
            error = await failure(started.stub.RunTask(request, timeout=60))
            assert error.reason == "OUTPUT_INVALID"
