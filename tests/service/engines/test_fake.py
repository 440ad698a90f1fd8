"""The fake engine: its scripted answers fit simple grammars, its failures come when asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from service.engines.fake import FakeEngine, scripted
from service.errors import EngineUnavailable, GrammarError
from service.schema_compiler.grammar_checks import check_answer
from service.structured_output.answers import AnswerValidator
from service.tasks.image_analysis import IMAGE_ANALYSIS
from service.types import Chunk, FinishReason, GenerateRequest, Grammar, GrammarKind, Sampling

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


async def chunks(engine: FakeEngine, **options: Any) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(GenerateRequest("id", "Hello", **options))]


async def started(*arguments: Any, **options: Any) -> FakeEngine:
    engine = FakeEngine(*arguments, **options)
    await engine.start()
    return engine


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        POINT,
        {"type": "string", "minLength": 12},
        {"type": "string", "maxLength": 2},
        {"type": ["null", "string"]},
        {"type": "number", "minimum": 3.5},
        {"type": "integer", "exclusiveMinimum": 7},
        {"type": "integer", "maximum": -4},
        {"type": "boolean"},
        {"const": [1, 2]},
        {"enum": ["b", "a"]},
        {"type": "array", "items": POINT, "minItems": 3},
        {"type": "array", "maxItems": 0},
        {"anyOf": [{"type": "null"}, POINT]},
        {"$ref": "#/$defs/point~1x", "$defs": {"point/x": POINT}},
        {
            "type": "object",
            "required": ["deep"],
            "properties": {"deep": {"type": "object", "required": ["y"]}},
        },
    ],
    ids=json.dumps,
)
def test_an_answer_fits_its_schema(schema: object) -> None:
    source = json.dumps(schema)
    AnswerValidator(source).parse(scripted(Grammar(GrammarKind.JSON_SCHEMA, source)))


def test_an_endless_schema_has_an_end() -> None:
    node = {"type": "object", "required": ["next"], "properties": {"next": {"$ref": "#"}}}
    text = scripted(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(node)))
    assert json.loads(text)["next"]["next"]


def test_regex_ebnf_and_choice_answers() -> None:
    choice = Grammar(GrammarKind.CHOICE, '["yes", "no"]')
    assert scripted(choice) == "yes"
    check_answer(choice, scripted(choice))
    assert scripted(Grammar(GrammarKind.REGEX, "[a-z]+")) == "fake"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.JSON_SCHEMA, "{"),
        (GrammarKind.CHOICE, "[]"),
        (GrammarKind.REGEX, "(("),
    ],
)
def test_a_grammar_that_cannot_be_read(kind: GrammarKind, source: str) -> None:
    with pytest.raises(GrammarError):
        scripted(Grammar(kind, source))


async def test_the_analysis_is_usable() -> None:
    engine = await started()
    answer = "".join(chunk.text for chunk in await chunks(engine, grammar=IMAGE_ANALYSIS.grammar))
    assert IMAGE_ANALYSIS.parse is not None
    assert IMAGE_ANALYSIS.usable is not None
    assert IMAGE_ANALYSIS.usable(IMAGE_ANALYSIS.parse(answer))


async def test_an_answer_can_be_a_function_of_the_request() -> None:
    engine = await started(lambda request: request.user.upper())
    assert (await chunks(engine))[0].text == "HELLO"


async def test_a_truncated_answer_has_the_finish_reason_length() -> None:
    engine = await started("one two three")
    *pieces, last = await chunks(engine, sampling=Sampling(max_tokens=2))
    assert [piece.text for piece in pieces] == ["one", " two"]
    assert (last.finish_reason, last.usage.output_tokens) == (FinishReason.LENGTH, 2)


async def test_failures_on_demand() -> None:
    engine = await started("one two three")
    engine.crash_after = 1
    with pytest.raises(RuntimeError, match="crash"):
        await chunks(engine)
    engine.crash_after, engine.hang_after = None, 1
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(chunks(engine), 0.05)
    engine.healthy = False
    with pytest.raises(EngineUnavailable):
        await engine.check_health()
    assert (engine.active_requests, engine.cancelled_requests) == (0, 1)


async def test_counts_follow_the_requests() -> None:
    engine = await started(token_delay_s=0.01)
    calls = [asyncio.ensure_future(chunks(engine)) for _ in range(3)]
    await asyncio.sleep(0.015)
    assert engine.active_requests == 3
    calls[0].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    counts = (engine.active_requests, engine.finished_requests, engine.cancelled_requests)
    assert counts == (0, 2, 1)
