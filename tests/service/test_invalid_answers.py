"""Finished answers that are wrong, however a model came to write them: no response holds one.

The fake engine minds no grammar, so the final validation stands alone.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest

from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import failure, inline, run_request, running, stream_failure

OPEN = {"json_schema": "{}"}

WRONG = {
    "NaN": (OPEN, "[NaN]", "", "json"),
    "infinity": (OPEN, "-Infinity", "", "json"),
    "a float that overflows": (OPEN, '{"a": 1e999}', "", "json"),
    "an integer of 5,000 digits": (OPEN, "9" * 5000, "", "json"),
    "half a surrogate pair": (OPEN, '"\\ud83d"', "", "json"),
    "half a surrogate pair in a name": (OPEN, '{"\\udc00": 1}', "", "json"),
    "300 levels": (OPEN, "[" * 300 + "]" * 300, "", "json"),
    "5,000 levels": (OPEN, "[" * 5000 + "]" * 5000, "", "json"),
    "an unfinished text": (OPEN, '{"a": [1, 2', "", "json"),
    "a second value": (OPEN, "{} {}", "", "json"),
    "a fence": (OPEN, "```json\n{}\n```", "", "json"),
    "a control character": (OPEN, '"\x01"', "", "json"),
    "nothing": (OPEN, " ", "", "json"),
    "a large number that is off by one": (
        {"json_schema": '{"items": {"const": 9007199254740993}}'},
        "[9007199254740993, 9007199254740992]", "/1", "const",
    ),
    "another type": (
        {"json_schema": '{"properties": {"a/b": {"type": "array"}}}'},
        '{"a/b": {}}', "/a~1b", "type",
    ),
    "a date that is none": (
        {"json_schema": '{"format": "date"}'}, '"2025-02-29"', "", "format",
    ),
    "an amount with a tenth of a cent": (
        {"json_schema": '{"items": {"multipleOf": 0.01}}'}, "[0.07, 19.99, 0.075]", "/2", "multipleOf",
    ),
    "a bound that binary64 meets": (
        {"json_schema": '{"maximum": 0.1}'}, "0.1000000000000000000001", "", "maximum",
    ),
    "a value that binary64 lists": (
        {"json_schema": '{"enum": [0.1, 1.0]}'}, "0.1000000000000000000001", "", "enum",
    ),
    "a number near zero": (
        {"json_schema": '{"multipleOf": 0.01}'}, "1e-999999999", "", "multipleOf",
    ),
    "an exponent of thirty digits": (OPEN, "1e-" + "9" * 30, "", "json"),
    "a fraction of 5,000 digits": (OPEN, "0." + "1" * 5000, "", "json"),
    "a regular expression": ({"regex": "[a-c]{3}"}, "abd", "", "regex"),
    "a line more": ({"regex": "[a-c]{3}"}, "abc\n", "", "regex"),
    "a choice": ({"choice": ["yes", "no"]}, "yes.", "", "choice"),
}  # fmt: skip


POWERS = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
EXPLODING = json.dumps({"$ref": "#/$defs/a0", "$defs": {**POWERS, "a40": {}}})
"""Each level applies the next one twice: 2 ** 40 checks for a validator that follows."""


@pytest.mark.parametrize("name", WRONG)
async def test_an_invalid_answer_is_never_returned(name: str) -> None:
    grammar, text, pointer, keyword = WRONG[name]
    request = run_request(inline(**grammar), max_tokens=100_000)
    stream = pb.StreamTaskRequest.FromString(request.SerializeToString())
    async with running(FakeEngine(text, context_length=200_000)) as started:
        error = await failure(started.stub.RunTask(request, timeout=60))
        events, streamed = await stream_failure(started.stub.StreamTask(stream, timeout=60))
    for found in (error, streamed):
        assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "OUTPUT_INVALID")
        assert found.metadata["keyword"] == keyword
        assert found.metadata.get("pointer", "") == pointer
        assert len(text) < 12 or text not in found.message
    assert not any(event.HasField("result") for event in events)


@pytest.mark.slow
async def test_endless_validation_is_stopped_and_does_not_affect_others() -> None:
    async with running(FakeEngine("1")) as started:
        exploding = started.stub.RunTask(run_request(inline(json_schema=EXPLODING)), timeout=60)
        waiting = asyncio.ensure_future(failure(exploding))
        beside = 0
        while not waiting.done():
            await started.stub.RunTask(run_request(inline(choice=["1"])), timeout=60)
            beside += 1
        error = await waiting
    assert error.reason == "OUTPUT_INVALID"
    assert error.message == "The model's answer could not be validated in bounded time."
    assert beside > 3, "they would have waited for all of the time limit"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (True, '{"a": 1, "A": 1, "\\u0062": [1.0, -0, 1E5]}'),
        ({"const": 10**400}, str(10**400)),
        ({"type": "string", "minLength": 1, "maxLength": 1}, '"\\ud83d\\ude00"'),
        ({"type": "string"}, '"\u2028\\u0000\x7f"'),
        (True, "[" * 150 + "]" * 150),
        ({"type": "integer"}, "1.0"),
        ({"multipleOf": 0.1}, "9" * 400),
        ({"multipleOf": 0.01, "minimum": 0.1}, "1e2"),
        ({"exclusiveMinimum": 0}, "1e-400"),
        ({"enum": [0.1, 1.0]}, "0.10"),
    ],
)
async def test_unusual_valid_answers_are_returned(schema: Any, text: str) -> None:
    """As the model wrote it, to the byte."""
    request = run_request(inline(json_schema=json.dumps(schema)), max_tokens=1000)
    async with running(FakeEngine(text)) as started:
        result = (await started.stub.RunTask(request, timeout=60)).result
    assert result.text == result.json == text
