"""The same request over gRPC and HTTP: the same answer, or the same reason."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from service.client import CHANNEL_OPTIONS, read_error
from service.engines.fake import FakeEngine
from service.error_table import REASONS
from service.errors import InternalError, InvalidRequest, Overloaded, ServiceError
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.types import Chunk, GenerateRequest
from tests.service.harness import image_bytes, png_header_only
from tests.service.http_api.harness import Reply, Serving, image_part, schema_format, serving

pytestmark = pytest.mark.slow  # a server for each request

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
LONG = {"type": "string", "minLength": 100, "maxLength": 2000}
DEEP: Any = {"type": "object"}
for _ in range(70):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@dataclass(frozen=True)
class Same:
    """One request in both forms. reason: of both errors; "" for an answer. param: of HTTP's error."""

    name: str
    reason: str = ""
    param: str = ""
    text: str = "Describe."
    images: tuple[bytes, ...] = ()
    schema: Any = None
    regex: str = ""
    ebnf: str = ""
    choice: tuple[str, ...] = ()
    task: str = ""
    strict: bool = False
    accept_empty: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    answer: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def over_grpc(one: Same) -> pb.RunTaskRequest:
    images = [pb.Image(data=data) for data in one.images]
    sampling = pb.SamplingOptions(**one.sampling)
    if one.task:
        named = pb.Task(name=one.task)
        return pb.RunTaskRequest(task=named, images=images, sampling=sampling, strict=one.strict)
    parts = [*(pb.Part(image=image) for image in images), pb.Part(text=one.text)]
    grammar = None
    if one.schema is not None:
        source = one.schema if isinstance(one.schema, str) else json.dumps(one.schema)
        grammar = pb.Grammar(json_schema=source)
    if one.regex:
        grammar = pb.Grammar(regex=one.regex)
    if one.ebnf:
        grammar = pb.Grammar(ebnf=one.ebnf)
    if one.choice:
        grammar = pb.Grammar(choice=pb.Choice(options=one.choice))
    message = pb.Message(role=pb.ROLE_USER, parts=parts)
    task = pb.Task(inline=pb.InlineTask(messages=[message], grammar=grammar))
    return pb.RunTaskRequest(task=task, sampling=sampling, strict=one.strict)


def over_http(one: Same) -> dict[str, Any]:
    content: list[dict[str, Any]] = [image_part(data) for data in one.images]
    found: dict[str, Any] = dict(one.sampling)
    if one.task:
        found["task"] = one.task
        content = content or [{"type": "text", "text": ""}]
    else:
        content.append({"type": "text", "text": one.text})
    if isinstance(one.schema, str):
        found["structured_outputs"] = {"json": one.schema}
    elif one.schema is not None:
        found["response_format"] = schema_format(one.schema)
    for name, value in (("regex", one.regex), ("grammar", one.ebnf), ("choice", one.choice)):
        if value:
            found["structured_outputs"] = {name: value}
    if one.strict:
        found["require_enforced"] = True
    return {**found, "messages": [{"role": "user", "content": content}]}


SCHEMA = "response_format.json_schema.schema"
URL = "messages[0].content[0].image_url.url"
ANALYSIS = "image-analysis"
NOTHING = json.dumps(
    {
        "scene": "", "description": "", "subjects": [], "objects": [], "actions": [], "mood": [],
        "shot_type": "", "lighting": [], "tags": [],
    }
)  # fmt: skip
PICTURE = image_bytes()
DAMAGED = image_bytes(file_format="PNG").replace(b"IDAT", b"IDAX")
NEWER = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "properties": {"a": {"$dynamicRef": "#"}},
}
REQUESTS = [
    Same("text", answer="One two."),
    Same("blank text", text=" ", answer="Nothing."),
    Same("images", images=(PICTURE, PICTURE), answer="Two."),
    Same("schema", schema=POINT),
    Same("checked schema", schema=LONG, answer=json.dumps("x" * 200)),
    Same("regex", regex="fa[jk]e"),
    Same("EBNF", ebnf='root ::= "fake"'),
    Same("choice", choice=("left", "right")),
    Same("sampling", sampling={"temperature": 0.5, "seed": 3, "top_k": 5}, answer="ok"),
    Same("sampling range", "SAMPLING_OPTION_INVALID", "temperature", sampling={"temperature": 3.0}),
    Same(
        "sampling of the engine",
        "SAMPLING_OPTION_INVALID",
        "top_k",
        sampling={"top_k": 5},
        engine={"sampling_options": ["max_tokens"]},
    ),
    Same(
        "long text", "TEXT_TOO_LONG", "messages", text="x" * 2000, settings={"max_text_bytes": 1000}
    ),
    Same(
        "long prompt",
        "CONTEXT_TOO_LONG",
        "messages",
        text="word " * 50,
        engine={"context_length": 20},
    ),
    Same("many tokens", "CONTEXT_TOO_LONG", "max_tokens", sampling={"max_tokens": 10**6}),
    Same("no image", "IMAGE_REQUIRED", "messages", task=ANALYSIS),
    Same(
        "many images",
        "TOO_MANY_IMAGES",
        "messages",
        images=(PICTURE,) * 2,
        engine={"max_images": 1},
    ),
    Same("no bytes", "IMAGE_EMPTY", URL, images=(b"",)),
    Same("damaged image", "IMAGE_INVALID", URL, images=(DAMAGED,)),
    Same("no width", "IMAGE_TOO_SMALL", URL, images=(png_header_only(0, 5),)),
    Same(
        "many pixels",
        "IMAGES_TOO_MANY_PIXELS",
        "messages",
        images=(PICTURE,) * 3,
        settings={"max_image_pixels": 4000, "max_request_pixels": 8000},
    ),
    Same(
        "much memory",
        "IMAGE_NEEDS_TOO_MUCH_MEMORY",
        URL,
        images=(png_header_only(4000, 4000),),
        settings={"max_decoding_bytes": 64 << 20},
    ),
    Same("not an image", "IMAGE_FORMAT_UNSUPPORTED", URL, images=(b"An image.",)),
    Same("cut image", "IMAGE_TRUNCATED", URL, images=(PICTURE[:-200],)),
    Same(
        "large image", "IMAGE_TOO_LARGE", URL, images=(PICTURE,), settings={"max_image_bytes": 100}
    ),
    Same("bomb", "IMAGE_TOO_MANY_PIXELS", URL, images=(png_header_only(60_000, 60_000),)),
    Same("strip", "IMAGE_ASPECT_RATIO", URL, images=(image_bytes(1, 10_000),)),
    Same("not JSON", "SCHEMA_NOT_JSON", "structured_outputs.json", schema="{"),
    Same("wrong schema", "SCHEMA_INVALID", SCHEMA, schema={"type": "strin"}),
    Same("envelope", "SCHEMA_ENVELOPE", SCHEMA, schema={"name": "a", "schema": POINT}),
    Same(
        "large schema",
        "SCHEMA_TOO_LARGE",
        SCHEMA,
        schema={"enum": ["x" * 2000]},
        settings={"max_schema_bytes": 1000},
    ),
    Same("deep schema", "SCHEMA_TOO_DEEP", SCHEMA, schema=DEEP),
    Same("remote reference", "SCHEMA_REMOTE_REF", SCHEMA, schema={"$ref": "https://example.org/a"}),
    Same(
        "pattern",
        "SCHEMA_PATTERN_UNSUPPORTED",
        SCHEMA,
        schema={"type": "string", "pattern": r"(a)\1"},
    ),
    Same(
        "unsatisfiable",
        "SCHEMA_UNSATISFIABLE",
        SCHEMA,
        schema={"type": "integer", "minimum": 5, "maximum": 4},
    ),
    Same("unknown to its draft", "SCHEMA_UNSUPPORTED", SCHEMA, schema=NEWER),
    Same("strict", "SCHEMA_NOT_ENFORCED", SCHEMA, schema=LONG, strict=True),
    Same("wrong regex", "GRAMMAR_INVALID", "structured_outputs.regex", regex="("),
    Same("no text matches", "GRAMMAR_UNSATISFIABLE", "structured_outputs.regex", regex="a^b"),
    Same(
        "kind",
        "GRAMMAR_KIND_UNSUPPORTED",
        "structured_outputs.regex",
        regex="a",
        engine={"grammar_kinds": []},
    ),
    Same("unknown task", "UNKNOWN_TASK", task="none-such", images=(PICTURE,)),
    Same("no vision", "VISION_DISABLED", images=(PICTURE,), engine={"vision": False}),
    Same(
        "cut answer",
        "OUTPUT_TRUNCATED",
        schema=POINT,
        answer='{"x": 1 }',
        sampling={"max_tokens": 1},
    ),
    Same("invalid answer", "OUTPUT_INVALID", schema=POINT, answer='{"x": "a"}'),
    Same("blank answer", "OUTPUT_INVALID", answer=" \n"),
    Same("says nothing", "NO_USABLE_FIELDS", task=ANALYSIS, images=(PICTURE,), answer=NOTHING),
]


async def ask(server: Serving, one: Same) -> tuple[Any, Reply]:
    """gRPC's result or error, and HTTP's reply."""
    address = f"127.0.0.1:{server.grpc.port}"
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = VisionServiceStub(channel)
        try:
            found = (await stub.RunTask(over_grpc(one), timeout=30)).result
        except grpc.aio.AioRpcError as error:
            found = read_error(error)
    return found, await server.chat(**over_http(one))


@pytest.mark.parametrize("one", REQUESTS, ids=lambda one: one.name)
async def test_the_same_request(one: Same) -> None:
    async with serving(FakeEngine(one.answer, **one.engine), **one.settings) as server:
        by_grpc, reply = await ask(server, one)
    if one.reason:
        assert by_grpc.reason == one.reason
        assert reply.error["code"] == one.reason, reply.error
        assert reply.status == REASONS[one.reason].http
        assert (reply.error["param"] or "") == one.param
        return
    assert reply.status == 200, reply.body
    assert reply.text == (by_grpc.json if by_grpc.HasField("json") else by_grpc.text)
    usage = reply.json["usage"]
    assert usage["prompt_tokens"] == by_grpc.usage.prompt_tokens
    assert usage["completion_tokens"] == by_grpc.usage.output_tokens
    assert usage["prompt_tokens_details"]["image_tokens"] == by_grpc.usage.image_tokens
    enforcement = pb.Enforcement.Name(by_grpc.enforcement).removeprefix("ENFORCEMENT_").lower()
    report = reply.json.get("structured_output", {"enforcement": "unspecified", "checked": []})
    assert report["enforcement"] == enforcement
    pointers = [keyword.pointer for keyword in by_grpc.checked]
    assert [keyword["pointer"] for keyword in report["checked"]] == pointers


class Raising(FakeEngine):
    """Ends every request with an error."""

    error: ServiceError | None = None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if self.error is not None:
            raise self.error
        async for chunk in super().generate(request):
            yield chunk


def error_of(reason: str) -> ServiceError:
    if reason == "OVERLOADED":
        return Overloaded("later", retry_after_s=0.01)
    if REASONS[reason].grpc == "INVALID_ARGUMENT":
        return InvalidRequest("task", "is wrong", reason=reason)
    return InternalError("text") if reason == "INTERNAL" else ServiceError("text", reason=reason)


async def test_every_reason_has_its_statuses_on_both() -> None:
    engine = Raising()
    async with serving(engine) as server:
        for reason, row in REASONS.items():
            engine.error = error_of(reason)
            by_grpc, reply = await ask(server, Same("text"))
            assert (by_grpc.reason, by_grpc.code.name) == (reason, row.grpc)
            assert (reply.error["code"], reply.status) == (reason, row.http)
            assert ("x-should-retry" in reply.headers) is not row.retry
            assert ("retry-after" in reply.headers) is row.retry
            assert reply.headers["x-request-id"]
