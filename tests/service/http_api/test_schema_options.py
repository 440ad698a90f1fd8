"""``close_objects``, ``property_order`` and ``schema_in_prompt`` mean the same in every API, whole and
streamed: the engine gets the same grammar and the same prompt."""

from __future__ import annotations

import itertools
import json
import struct
from typing import Any

import grpc.aio
import pytest

pytest.importorskip("service.grpc_api.connect", reason="connectrpc needs Python 3.11 or newer")

from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.types import GenerateRequest, Role, TextPart
from tests.service.http_api.harness import Serving, schema_format, serving

pytestmark = pytest.mark.slow

SCHEMA: dict[str, Any] = {
    "title": "Receipt",
    "type": "object",
    "properties": {"total": {"type": "integer", "title": "Total"}, "tax": {"type": "integer"}},
    "required": ["total"],
}
SOURCE = json.dumps(SCHEMA)
RPC = "/qwen3vl.v1.VisionService"
Seen = tuple[str, Any, str]


class Listening(FakeEngine):
    """Keeps the grammar, the order and the system text of each request."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.seen: list[Seen] = []

    def _answer(self, request: GenerateRequest) -> str:
        if request.grammar is not None:  # not the warm-up
            first = request.conversation[0]
            texts = [part.text for part in first.parts if isinstance(part, TextPart)]
            system = "".join(texts) if first.role is Role.SYSTEM else ""
            self.seen.append((request.grammar.ebnf, request.grammar.property_order, system))
        return '{"total": 3}'


async def by_grpc(server: Serving, closed: bool, any_order: bool, shown: bool) -> None:
    order = pb.PROPERTY_ORDER_ANY if any_order else pb.PROPERTY_ORDER_DECLARED
    grammar = pb.Grammar(json_schema=SOURCE, close_objects=closed, property_order=order)
    inline = pb.InlineTask(user="How much?", grammar=grammar, schema_in_prompt=shown)
    task = pb.Task(inline=inline)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
        stub = VisionServiceStub(channel)
        await stub.RunTask(pb.RunTaskRequest(task=task), timeout=60)
        async for _ in stub.StreamTask(pb.StreamTaskRequest(task=task), timeout=60):
            pass


async def by_connect(server: Serving, closed: bool, any_order: bool, shown: bool) -> None:
    order = "PROPERTY_ORDER_ANY" if any_order else "PROPERTY_ORDER_DECLARED"
    grammar = {"jsonSchema": SOURCE, "closeObjects": closed, "propertyOrder": order}
    task = {"inline": {"user": "How much?", "grammar": grammar, "schemaInPrompt": shown}}
    body = json.dumps({"task": task}).encode()
    framed = struct.pack(">BI", 0, len(body)) + body
    whole = await server.request("POST", f"{RPC}/RunTask", body)
    stream = await server.request(
        "POST", f"{RPC}/StreamTask", framed, {"content-type": "application/connect+json"}
    )
    assert (whole.status, stream.status) == (200, 200), (whole.body, stream.body)


async def by_openai(server: Serving, closed: bool, any_order: bool, shown: bool) -> None:
    options: dict[str, Any] = {
        "close_objects": closed,
        "property_order": "any" if any_order else "declared",
        "schema_in_prompt": shown,
    }
    text = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    response = {"model": "fake", "input": "How much?", "text": text, **options}
    for stream in (False, True):
        body = json.dumps({**response, "stream": stream}).encode()
        replies = [
            await server.chat(response_format=schema_format(SCHEMA), stream=stream, **options),
            await server.request("POST", "/v1/responses", body),
        ]
        assert [one.status for one in replies] == [200, 200], [one.body for one in replies]


async def test_every_api_has_the_same_options_with_the_same_meaning() -> None:
    engine = Listening()
    found: set[Seen] = set()
    async with serving(engine) as server:
        for options in itertools.product((False, True), repeat=3):
            engine.seen.clear()
            for way in (by_grpc, by_connect, by_openai):
                await way(server, *options)
            assert len(engine.seen) == 8, "gRPC, Connect, chat and responses, whole and streamed"
            (same,) = set(engine.seen)
            found.add(same)
    assert len(found) == 8, "each combination is another request"
