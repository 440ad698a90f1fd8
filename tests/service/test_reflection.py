"""A client without stubs: everything it knows comes from the server, as with grpcurl."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from tests.service.harness import failure, picture, running


class ReflectionClient:
    """Finds services and builds messages by reflection; requests and answers are plain values."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = DescriptorPool(self.database)

    def services(self) -> list[str]:
        return sorted(self.database.get_services())

    def methods(self, service: str) -> list[str]:
        return [method.name for method in self.pool.FindServiceByName(service).methods]

    def call(self, service: str, name: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """All messages of the answer; a unary method has one."""
        method = self.pool.FindServiceByName(service).FindMethodByName(name)
        message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
        answer = GetMessageClass(method.output_type)
        kind = self.channel.unary_stream if method.server_streaming else self.channel.unary_unary
        rpc = kind(
            f"/{service}/{name}",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        found = rpc(message, timeout=10)
        answers = list(found) if method.server_streaming else [found]
        return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in answers]


SERVICE = "qwen3vl.v1.VisionService"
IMAGE = {"data": base64.b64encode(picture()).decode()}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TASK = {"inline": {"user": "Where?", "grammar": {"json_schema": json.dumps(POINT)}}}


def explore(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        client = ReflectionClient(channel)
        assert client.services() == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            SERVICE,
        ]
        assert client.methods(SERVICE) == [
            "AnalyzeImage",
            "RunTask",
            "StreamTask",
            "ListTasks",
            "GetTask",
            "GetModel",
        ]
        [model] = client.call(SERVICE, "GetModel", {})
        assert model["engine"] == "fake"
        assert "GRAMMAR_KIND_JSON_SCHEMA" in model["capabilities"]["grammar_kinds"]

        [analysis] = client.call(SERVICE, "AnalyzeImage", {"images": [IMAGE]})
        assert analysis["finish_reason"] == "FINISH_REASON_STOP"
        assert analysis["analysis"]["subjects"] == ["subjects"]

        request = {"task": TASK, "images": [IMAGE], "sampling": {"max_tokens": 16}}
        [answer] = client.call(SERVICE, "RunTask", request)
        assert json.loads(answer["result"]["json"]) == {"x": 0}
        assert answer["result"]["usage"]["image_tokens"] > 0

        events = client.call(SERVICE, "StreamTask", request)
        assert "".join(event["delta"] for event in events[:-1]) == events[-1]["result"]["text"]

        [health] = client.call("grpc.health.v1.Health", "Check", {"service": SERVICE})
        assert health == {"status": "SERVING"}


async def test_a_client_that_knows_only_the_address() -> None:
    async with running() as started:
        await asyncio.to_thread(explore, started.address)


async def test_reflection_can_be_turned_off() -> None:
    async with running(reflection=False) as started:
        stub = ServerReflectionStub(started.channel)
        request = ServerReflectionRequest(list_services="")
        error = await failure(stub.ServerReflectionInfo(iter([request])).read())
        assert error.code is grpc.StatusCode.UNIMPLEMENTED
