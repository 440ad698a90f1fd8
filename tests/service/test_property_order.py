"""The order of properties through a real server: per request, per task and per server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.engines.reference.sampler import Sampler
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.structured_output.pool import GrammarPool
from service.types import GenerateRequest, PropertyOrder
from tests.service.bending import bent, serving
from tests.service.harness import failure, inline, run_request, running
from tests.service.http_api import harness as http
from tests.service.http_api.harness import schema_format

DECLARED, ANY = pb.PROPERTY_ORDER_DECLARED, pb.PROPERTY_ORDER_ANY
UNSAID = pb.PROPERTY_ORDER_UNSPECIFIED
RECEIPT: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "integer"} for name in ("total", "date", "vendor", "tax")},
    "additionalProperties": {"type": "integer"},
}
NAMES = frozenset(RECEIPT["properties"])


class Listening(FakeEngine):
    """Keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.asked: list[GenerateRequest] = []

    def _answer(self, request: GenerateRequest) -> str:
        self.asked.append(request)
        return "{}"

    @property
    def orders(self) -> list[PropertyOrder | None]:
        return [one.grammar.property_order for one in self.asked if one.grammar is not None]


def asking(order: pb.PropertyOrder.ValueType, schema: Any = RECEIPT) -> pb.RunTaskRequest:
    return run_request(inline(json_schema=json.dumps(schema), property_order=order))


@pytest.mark.parametrize("default", ["declared", "any"])
async def test_a_request_says_the_order_or_the_server_does(default: str) -> None:
    engine = Listening()
    async with running(engine, property_order=default) as started:
        for order in (UNSAID, DECLARED, ANY):
            await started.stub.RunTask(asking(order), timeout=60)
        async for _ in started.stub.StreamTask(
            pb.StreamTaskRequest(task=asking(ANY).task), timeout=60
        ):
            pass
    declared, any_order = PropertyOrder.DECLARED, PropertyOrder.ANY
    assert engine.orders == [PropertyOrder(default), declared, any_order, any_order]


async def test_a_task_says_the_order(tmp_path: Path) -> None:
    text = f"description: d\nuser: u\njson_schema: '{json.dumps(RECEIPT)}'\n"
    (tmp_path / "free.yaml").write_text(text + "property_order: any")
    (tmp_path / "unsaid.yaml").write_text(text)
    engine = Listening()
    async with running(engine, tasks_dir=tmp_path) as started:
        listed = (await started.stub.ListTasks(pb.ListTasksRequest(), timeout=60)).tasks
        for name in ("free", "unsaid"):
            await started.stub.RunTask(run_request(pb.Task(name=name)), timeout=60)
    assert engine.orders == [PropertyOrder.ANY, PropertyOrder.DECLARED]
    orders = {task.name: task.grammar.property_order for task in listed}
    assert orders == {"free": ANY, "unsaid": DECLARED, "image-analysis": DECLARED}


@pytest.mark.parametrize("default", ["declared", "any"])
async def test_validation_tells_where_any_order_ends(default: str) -> None:
    names = [f"{letter}name" for letter in "qwertyuiopasdf"]
    schema = {
        "type": "object",
        "properties": {name: {} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    async with running(property_order=default) as started:

        async def reason(order: pb.PropertyOrder.ValueType) -> str:
            grammar = pb.Grammar(json_schema=json.dumps(schema), property_order=order)
            request = pb.ValidateSchemaRequest(grammar=grammar)
            response = await started.stub.ValidateSchema(request, timeout=60)
            (found,) = [one for one in response.keywords if one.pointer == "/properties"]
            assert found.enforcement == pb.ENFORCEMENT_ENFORCED
            return str(found.reason)

        kept = (
            "optional properties in any order, the 14 required ones near the order of `properties` or of "
            "`required`"
        )
        assert await reason(ANY) == kept
        assert await reason(DECLARED) == ""
        assert await reason(UNSAID) == (kept if default == "any" else "")


@pytest.mark.slow
async def test_each_property_order_has_its_own_cached_analysis() -> None:
    engine = Listening()
    pool = GrammarPool(1, 20)
    await pool.start()
    async with running(engine, analyser=pool.analyse, pool=pool) as started:
        for order in (DECLARED, ANY, DECLARED, ANY):
            await started.stub.RunTask(asking(order), timeout=30)
    ebnf = [one.grammar.ebnf for one in engine.asked if one.grammar is not None]
    assert ebnf[0] == ebnf[2] != ebnf[1] == ebnf[3]
    assert engine.orders == [PropertyOrder.DECLARED, PropertyOrder.ANY] * 2


@pytest.mark.slow
async def test_over_http() -> None:
    engine = Listening()
    form = schema_format(RECEIPT)
    text = {"format": {"type": "json_schema", "name": "a", "schema": RECEIPT}}
    body = {"model": "fake", "input": "Count.", "text": text, "property_order": "any"}
    async with http.serving(engine) as server:
        for wish in ({"property_order": "any"}, {"property_order": "declared"}, {}):
            reply = await server.chat(response_format=form, **wish)
            assert reply.status == 200, reply.body
        reply = await server.request("POST", "/v1/responses", json.dumps(body).encode())
        assert reply.status == 200, reply.body
        refused = await server.chat(structured_outputs={"regex": "a"}, property_order="any")
    any_order, declared = PropertyOrder.ANY, PropertyOrder.DECLARED
    assert engine.orders == [any_order, declared, declared, any_order]
    assert (refused.status, refused.error["param"]) == (400, "property_order")


async def test_an_invalid_property_order_is_an_error() -> None:
    async with running() as started:
        unknown: Any = 7
        error = await failure(started.stub.RunTask(asking(unknown), timeout=60))
        regex = run_request(inline(regex="a", property_order=ANY))
        other = await failure(started.stub.RunTask(regex, timeout=60))
    for one in (error, other):
        assert list(one.fields) == ["task.inline.grammar.property_order"]
    assert "PROPERTY_ORDER_ANY" in error.message
    assert "json_schema alone" in other.message


@pytest.mark.slow
@pytest.mark.parametrize("wish", [b'{"vendor": 3, "total": 1}', b'{"total": 1, "total": 2}'])
async def test_a_property_out_of_order_does_not_get_a_garbled_name(
    wish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that wants a declared name where it cannot be gets another name, not ``totalX``."""
    schema = {**RECEIPT, "minProperties": 2, "maxProperties": 2}
    async with serving() as (_, engine, stub):
        model = bent(engine, stub)
        monkeypatch.setattr(Sampler, "choose", lambda self, logits: model.choose(self, logits))
        model.script = wish
        result = await model.run(schema)
        document = json.loads(result.json)
        assert result.text.startswith(wish.decode()[:10]), "as far as it goes, the wish is followed"
        assert len(document) == 2
        garbled = {name for name in document.keys() - NAMES if name.startswith(tuple(NAMES))}
        assert not garbled, document
        model.written.clear()
        if wish.startswith(b'{"vendor'):
            request = asking(ANY)
            request.sampling.max_tokens = 120
            result = (await stub.RunTask(request, timeout=60)).result
            assert result.json.encode() == wish, "any order has a place for it"
