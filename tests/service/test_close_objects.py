"""``close_objects`` through real servers: per request, per task and per server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.structured_output.pool import GrammarPool
from service.types import GenerateRequest
from tests.service.harness import failure, inline, run_request, running
from tests.service.http_api.harness import schema_format, serving

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"total": {"type": "integer"}, "tax": {"type": "integer"}},
    "required": ["total"],
}
CLOSED = {**SCHEMA, "additionalProperties": False}


class Listening(FakeEngine):
    """Keeps what it was asked."""

    def __init__(self, text: str = '{"total": 3}') -> None:
        super().__init__(self._answer)
        self.text = text
        self.asked: list[GenerateRequest] = []

    def _answer(self, request: GenerateRequest) -> str:
        self.asked.append(request)
        return self.text

    @property
    def schemas(self) -> list[Any]:
        return [json.loads(one.grammar.source) for one in self.asked if one.grammar is not None]


def asking(close_objects: bool | None = None, schema: Any = SCHEMA) -> pb.RunTaskRequest:
    return run_request(inline(json_schema=json.dumps(schema), close_objects=close_objects))


@pytest.mark.parametrize("default", [False, True])
async def test_a_request_decides_or_the_server_does(default: bool) -> None:
    engine = Listening()
    async with running(engine, close_objects=default) as started:
        for wish in (None, False, True):
            await started.stub.RunTask(asking(wish), timeout=60)
        request = pb.StreamTaskRequest(task=asking(True).task)
        async for _ in started.stub.StreamTask(request, timeout=60):
            pass
    assert engine.schemas == [CLOSED if default else SCHEMA, SCHEMA, CLOSED, CLOSED]
    ebnf = [one.grammar.ebnf for one in engine.asked if one.grammar is not None]
    assert ebnf[1] != ebnf[2] == ebnf[3]


async def test_answers_are_validated_against_the_closed_schema() -> None:
    async with running(Listening('{"total": 3, "note": "x"}')) as started:
        result = (await started.stub.RunTask(asking(), timeout=60)).result
        assert json.loads(result.json)["note"] == "x"
        error = await failure(started.stub.RunTask(asking(True), timeout=60))
    assert error.reason == "OUTPUT_INVALID"
    assert error.metadata["keyword"] == "additionalProperties"
    assert error.metadata["pointer"] == "/note"


async def test_a_task_decides(tmp_path: Path) -> None:
    text = f"description: d\nuser: u\njson_schema: '{json.dumps(SCHEMA)}'\n"
    (tmp_path / "narrow.yaml").write_text(text + "close_objects: true")
    (tmp_path / "unsaid.yaml").write_text(text)
    engine = Listening()
    async with running(engine, tasks_dir=tmp_path) as started:
        listed = (await started.stub.ListTasks(pb.ListTasksRequest(), timeout=60)).tasks
        for name in ("narrow", "unsaid"):
            await started.stub.RunTask(run_request(pb.Task(name=name)), timeout=60)
    assert engine.schemas == [CLOSED, SCHEMA]
    shown = {task.name: task.grammar for task in listed}
    assert shown["narrow"].close_objects
    assert json.loads(shown["narrow"].json_schema) == CLOSED
    assert not shown["unsaid"].close_objects
    assert json.loads(shown["unsaid"].json_schema) == SCHEMA


async def test_validation_lists_what_is_closed() -> None:
    async with running() as started:

        async def validated(close_objects: bool | None) -> pb.ValidateSchemaResponse:
            grammar = pb.Grammar(json_schema=json.dumps(SCHEMA), close_objects=close_objects)
            request = pb.ValidateSchemaRequest(grammar=grammar)
            found: pb.ValidateSchemaResponse = await started.stub.ValidateSchema(
                request, timeout=60
            )
            return found

        opened, narrow = await validated(None), await validated(True)
    assert not any("close_objects" in one.what for one in opened.rewrites)
    (said,) = [one for one in opened.keywords if one.reason]
    assert (said.pointer, said.enforcement) == ("/properties", pb.ENFORCEMENT_ENFORCED)
    assert "close_objects" in said.reason
    assert [one.pointer for one in narrow.rewrites if "close_objects" in one.what] == [""]
    assert not any(one.reason for one in narrow.keywords)


async def test_close_objects_is_for_a_json_schema_alone() -> None:
    async with running() as started:
        request = run_request(inline(regex="a", close_objects=False))
        error = await failure(started.stub.RunTask(request, timeout=60))
    assert list(error.fields) == ["task.inline.grammar.close_objects"]
    assert "json_schema alone" in error.message


@pytest.mark.slow
async def test_the_workers_send_the_closed_schema_back() -> None:
    engine = Listening()
    pool = GrammarPool(1, 20)
    await pool.start()
    async with running(engine, analyser=pool.analyse, pool=pool) as started:
        for wish in (False, True, False, True):
            await started.stub.RunTask(asking(wish), timeout=30)
    assert engine.schemas == [SCHEMA, CLOSED, SCHEMA, CLOSED]


@pytest.mark.slow
async def test_over_http() -> None:
    engine = Listening()
    body = {"model": "fake", "input": "Count."}
    form = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    async with serving(engine) as server:
        reply = await server.chat(response_format=schema_format(SCHEMA), close_objects=True)
        assert reply.status == 200, reply.body
        document = json.dumps({**body, "text": form, "close_objects": True}).encode()
        reply = await server.request("POST", "/v1/responses", document)
        assert reply.status == 200, reply.body
        reply = await server.chat(response_format=schema_format(SCHEMA))
        assert engine.schemas == [CLOSED, CLOSED, SCHEMA]
        refused = await server.chat(close_objects=True)
        assert (refused.status, refused.error["param"]) == (400, "close_objects")
