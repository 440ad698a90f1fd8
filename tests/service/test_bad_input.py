"""What callers get wrong, one line each: status, reason and field, through a real server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
import pytest_asyncio

from service.engines.fake import FakeEngine
from service.inference.calls import ANALYZE_TASK
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import (
    Running,
    failure,
    image_bytes,
    inline,
    png_header_only,
    run_request,
    running,
    stream_failure,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
CONTEXT_LENGTH = 2048
MAX_MESSAGE_BYTES = 3_000_000
NESTED = json.dumps({"type": "array"})
for _ in range(70):
    NESTED = f'{{"type": "array", "items": {NESTED}}}'


@dataclass(frozen=True)
class Bad:
    """A request that is refused, and how."""

    name: str
    request: pb.RunTaskRequest
    reason: str
    field: str
    code: grpc.StatusCode = INVALID


def with_grammar(**grammar: object) -> pb.RunTaskRequest:
    return run_request(inline(**grammar))


def with_bounds(**bounds: int) -> pb.RunTaskRequest:
    return pb.RunTaskRequest(task=inline(), images=[pb.Image(data=image_bytes(), **bounds)])


CASES = [
    # The task
    Bad("no task", pb.RunTaskRequest(), "INVALID_FIELD", "task"),
    Bad("empty task", pb.RunTaskRequest(task=pb.Task()), "INVALID_FIELD", "task"),
    Bad("empty name", run_request(pb.Task(name="")), "INVALID_FIELD", "task.name"),
    Bad("long name", run_request(pb.Task(name="x" * 129)), "INVALID_FIELD", "task.name"),
    Bad("no user text", run_request(inline("")), "TEXT_EMPTY", "task.inline.user"),
    Bad("blank user text", run_request(inline(" \n")), "TEXT_EMPTY", "task.inline.user"),
    Bad("long text", run_request(inline("x" * 262_145)), "TEXT_TOO_LONG", "task.inline.user"),
    Bad(
        "no image",
        run_request(pb.Task(name=ANALYZE_TASK)),
        "IMAGE_REQUIRED",
        "images",
    ),
    # Images
    Bad("0 bytes", run_request(images=[image_bytes(), b""]), "IMAGE_EMPTY", "images[1].data"),
    Bad(
        "no source",
        pb.RunTaskRequest(task=inline(), images=[pb.Image()]),
        "IMAGE_EMPTY",
        "images[0].data",
    ),
    Bad(
        "text as image",
        run_request(images=[b"An image."]),
        "IMAGE_FORMAT_UNSUPPORTED",
        "images[0].data",
    ),
    Bad(
        "truncated", run_request(images=[image_bytes()[:-200]]), "IMAGE_TRUNCATED", "images[0].data"
    ),
    Bad(
        "truncated PNG",
        run_request(images=[image_bytes(file_format="PNG")[:-40]]),
        "IMAGE_TRUNCATED",
        "images[0].data",
    ),
    Bad(
        "truncated WebP",
        run_request(images=[image_bytes(), image_bytes(file_format="WEBP")[:-20]]),
        "IMAGE_TRUNCATED",
        "images[1].data",
    ),
    Bad(
        "GIF",
        run_request(images=[image_bytes(file_format="GIF")]),
        "IMAGE_FORMAT_UNSUPPORTED",
        "images[0].data",
    ),
    Bad(
        "too many bytes",
        run_request(images=[image_bytes().ljust(1_000_001, b"\0")]),
        "IMAGE_TOO_LARGE",
        "images[0].data",
    ),
    Bad(
        "bomb",
        run_request(images=[image_bytes(), image_bytes(), png_header_only(60_000, 60_000)]),
        "IMAGE_TOO_MANY_PIXELS",
        "images[2].data",
    ),
    Bad(
        "strip",
        run_request(images=[image_bytes(1, 10_000)]),
        "IMAGE_ASPECT_RATIO",
        "images[0].data",
    ),
    Bad("65 images", run_request(images=[image_bytes(8, 8)] * 65), "TOO_MANY_IMAGES", "images"),
    Bad("min_pixels 0", with_bounds(min_pixels=0), "INVALID_FIELD", "images[0].min_pixels"),
    Bad("max_pixels 0", with_bounds(max_pixels=0), "INVALID_FIELD", "images[0].max_pixels"),
    Bad(
        "bounds crossed",
        with_bounds(min_pixels=9, max_pixels=8),
        "INVALID_FIELD",
        "images[0].min_pixels",
    ),
    # Grammars
    Bad(
        "no kind",
        run_request(pb.Task(inline=pb.InlineTask(user="Hi", grammar=pb.Grammar()))),
        "INVALID_FIELD",
        "task.inline.grammar",
    ),
    Bad(
        "not JSON",
        with_grammar(json_schema="{type:"),
        "SCHEMA_NOT_JSON",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "a list",
        with_grammar(json_schema="[]"),
        "SCHEMA_INVALID",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "a string",
        with_grammar(json_schema='"object"'),
        "SCHEMA_INVALID",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "empty schema",
        with_grammar(json_schema=""),
        "SCHEMA_NOT_JSON",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "not a schema",
        with_grammar(json_schema='{"type": "thing"}'),
        "SCHEMA_INVALID",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "a schema in an envelope",
        with_grammar(json_schema='{"name": "n", "strict": true, "schema": {"type": "object"}}'),
        "SCHEMA_ENVELOPE",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "schema from elsewhere",
        with_grammar(json_schema='{"$ref": "https://example.org/schema.json"}'),
        "SCHEMA_REMOTE_REF",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "over 256 KiB",
        with_grammar(json_schema=json.dumps({"title": "x" * 262_144})),
        "SCHEMA_TOO_LARGE",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "too deep",
        with_grammar(json_schema=NESTED),
        "SCHEMA_TOO_DEEP",
        "task.inline.grammar.json_schema",
    ),
    Bad(
        "bad regex", with_grammar(regex="(unclosed"), "GRAMMAR_INVALID", "task.inline.grammar.regex"
    ),
    Bad(
        "long regex", with_grammar(regex="a" * 1025), "GRAMMAR_INVALID", "task.inline.grammar.regex"
    ),
    Bad(
        "no choice",
        with_grammar(choice=[]),
        "GRAMMAR_INVALID",
        "task.inline.grammar.choice.options",
    ),
    Bad(
        "blank choice",
        with_grammar(choice=["a", ""]),
        "GRAMMAR_INVALID",
        "task.inline.grammar.choice.options[1]",
    ),
    # Sampling
    Bad(
        "NaN",
        run_request(temperature=float("nan")),
        "SAMPLING_OPTION_INVALID",
        "sampling.temperature",
    ),
    Bad(
        "infinite",
        run_request(temperature=float("inf")),
        "SAMPLING_OPTION_INVALID",
        "sampling.temperature",
    ),
    Bad("hot", run_request(temperature=2.1), "SAMPLING_OPTION_INVALID", "sampling.temperature"),
    Bad("top_p 0", run_request(top_p=0.0), "SAMPLING_OPTION_INVALID", "sampling.top_p"),
    Bad("top_p NaN", run_request(top_p=float("nan")), "SAMPLING_OPTION_INVALID", "sampling.top_p"),
    Bad("top_p over 1", run_request(top_p=1.01), "SAMPLING_OPTION_INVALID", "sampling.top_p"),
    Bad("top_k 0", run_request(top_k=0), "SAMPLING_OPTION_INVALID", "sampling.top_k"),
    Bad(
        "penalty 0",
        run_request(repetition_penalty=0),
        "SAMPLING_OPTION_INVALID",
        "sampling.repetition_penalty",
    ),
    Bad(
        "max_tokens 0", run_request(max_tokens=0), "SAMPLING_OPTION_INVALID", "sampling.max_tokens"
    ),
    Bad(
        "penalty NaN",
        run_request(repetition_penalty=float("nan")),
        "SAMPLING_OPTION_INVALID",
        "sampling.repetition_penalty",
    ),
    Bad(
        "max_tokens over every context",
        run_request(max_tokens=2**32 - 1),
        "CONTEXT_TOO_LONG",
        "sampling.max_tokens",
    ),
    Bad(
        "max_tokens over context",
        run_request(max_tokens=CONTEXT_LENGTH),
        "CONTEXT_TOO_LONG",
        "sampling.max_tokens",
    ),
    Bad(
        "prompt over context",
        run_request(inline("word " * 3000), max_tokens=1),
        "CONTEXT_TOO_LONG",
        "task",
    ),
    Bad(
        "prompt over context, max_tokens unset",
        run_request(inline("word " * 3000)),
        "CONTEXT_TOO_LONG",
        "task",
    ),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server() -> AsyncIterator[Running]:
    engine = FakeEngine(context_length=CONTEXT_LENGTH)
    async with running(
        engine, max_message_bytes=MAX_MESSAGE_BYTES, max_image_bytes=1_000_000
    ) as started:
        yield started


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_bad_requests_are_refused_with_reason_and_field(server: Running, case: Bad) -> None:
    before = server.engine.finished_requests
    error = await failure(server.stub.RunTask(case.request, timeout=60))
    assert (error.code, error.reason) == (case.code, case.reason)
    assert next(iter(error.fields)) == case.field
    assert error.message.startswith(f"{case.field}: ")
    assert error.metadata["request_id"] == error.request_id != ""
    assert server.engine.finished_requests == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_streams_refuse_the_same_bad_requests(server: Running, case: Bad) -> None:
    request = pb.StreamTaskRequest.FromString(case.request.SerializeToString())
    events, error = await stream_failure(server.stub.StreamTask(request, timeout=60))
    assert events == []
    assert (error.code, error.reason) == (case.code, case.reason)
    assert next(iter(error.fields)) == case.field


async def test_analyze_image_needs_an_image(server: Running) -> None:
    error = await failure(server.stub.AnalyzeImage(pb.AnalyzeImageRequest(), timeout=60))
    assert (error.code, error.reason) == (INVALID, "IMAGE_REQUIRED")
    assert list(error.fields) == ["images"]


async def test_all_bad_options_are_named_at_once(server: Running) -> None:
    request = run_request(temperature=float("-inf"), top_p=1.5, max_tokens=0)
    error = await failure(server.stub.RunTask(request, timeout=60))
    assert list(error.fields) == ["sampling.temperature", "sampling.top_p", "sampling.max_tokens"]


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_unknown_task(server: Running, method: str) -> None:
    request = run_request(pb.Task(name="image-analisys"))
    if method == "RunTask":
        error = await failure(server.stub.RunTask(request, timeout=60))
    else:
        streamed = pb.StreamTaskRequest.FromString(request.SerializeToString())
        _, error = await stream_failure(server.stub.StreamTask(streamed, timeout=60))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_TASK")
    assert ANALYZE_TASK in error.message


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("", INVALID, "INVALID_FIELD"),
        ("nothing", grpc.StatusCode.NOT_FOUND, "UNKNOWN_TASK"),
        ("x" * 129, INVALID, "INVALID_FIELD"),
    ],
)
async def test_get_task_with_an_unknown_name(
    server: Running, name: str, code: grpc.StatusCode, reason: str
) -> None:
    error = await failure(server.stub.GetTask(pb.GetTaskRequest(name=name), timeout=60))
    assert (error.code, error.reason) == (code, reason)


def field(number: int, value: bytes) -> bytes:
    """A field of bytes, text or a message, as it is on the wire."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


NO_TEXT = b"a\xff\xfe"


@pytest.mark.parametrize(
    "request_bytes",
    [
        field(1, field(1, NO_TEXT)),
        field(1, field(2, field(1, NO_TEXT) + field(2, b"Hi"))),
        field(1, field(2, field(2, NO_TEXT))),
        field(1, field(2, field(2, b"Hi") + field(3, field(1, NO_TEXT)))),
        field(1, field(2, field(2, b"Hi") + field(3, field(4, field(1, NO_TEXT))))),
        field(1, field(2, field(2, b"\xed\xa0\x80"))),  # half of a surrogate pair
    ],
    ids=["name", "system", "user", "schema", "choice", "surrogate"],
)
async def test_text_that_is_not_utf8(server: Running, request_bytes: bytes) -> None:
    error = await failure(server.raw("RunTask", request_bytes))
    assert (error.code, error.reason) == (INVALID, "MALFORMED_REQUEST")
    assert "UTF-8" in error.message


async def test_bytes_that_are_no_message(server: Running) -> None:
    error = await failure(server.raw("AnalyzeImage", b"\xff\xff\xff"))
    assert (error.code, error.reason) == (INVALID, "MALFORMED_REQUEST")


@pytest.mark.parametrize(
    ("request_bytes", "path"),
    [
        (b"\xa0\x06\x01", "request"),  # field 100 of the request, a number
        (b"\x0a\x05\x12\x03\xa0\x06\x02", "task.inline"),  # field 100 inside of task.inline
        (b"\x12\x03\x80\x01\x07", "images[0]"),  # field 16 of an image
        (b"\x12\x05\x12\x03url", "images[0]"),  # its address, kept for later
        (b"\x0a\x0b\x12\x09\x12\x02Hi\x1a\x03\x2a\x01x", "task.inline.grammar"),  # a new kind
        (b"\x1a\x02\x40\x01", "sampling"),  # a new option
    ],
)
async def test_fields_of_a_newer_api(server: Running, request_bytes: bytes, path: str) -> None:
    error = await failure(server.raw("RunTask", request_bytes))
    assert (error.code, error.reason) == (INVALID, "UNKNOWN_FIELD")
    assert list(error.fields) == [path]


async def test_message_over_the_size_limit(server: Running) -> None:
    request = run_request(images=[bytes(MAX_MESSAGE_BYTES)])
    error = await failure(server.stub.RunTask(request, timeout=60))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in error.message


@pytest.mark.slow
async def test_message_that_unpacks_over_the_size_limit() -> None:
    limits = {"max_message_bytes": MAX_MESSAGE_BYTES, "max_image_bytes": 1_000_000}
    async with running(compressed_requests=True, **limits) as server:
        gzip = grpc.Compression.Gzip
        assert (await server.stub.RunTask(run_request(), timeout=60, compression=gzip)).result.text
        request = run_request(images=[bytes(50_000_000)])
        error = await failure(server.stub.RunTask(request, timeout=60, compression=gzip))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("way", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_refused_by_default(
    server: Running, way: grpc.Compression
) -> None:
    request = run_request(inline("word " * 1000))  # gRPC compresses what gets smaller
    error = await failure(server.stub.RunTask(request, timeout=60, compression=way))
    assert (error.code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "REQUEST_COMPRESSED")
    assert "gzip" in error.message


async def test_unknown_grammar_kinds_and_enum_values_are_refused(
    server: Running,
) -> None:
    """No request has an enum (see test_codec); where one is put as a number, it is refused."""
    grammar = field(2, b"Hi") + field(3, b"\x08\x63")  # 99 where the schema's text belongs
    error = await failure(server.raw("RunTask", field(1, field(2, grammar))))
    assert (error.code, error.reason) == (INVALID, "UNKNOWN_FIELD")
    assert list(error.fields) == ["task.inline.grammar"]


async def test_unknown_method(server: Running) -> None:
    error = await failure(server.raw("Nothing", b""))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED


async def test_the_server_still_answers(server: Running) -> None:
    response = await server.stub.RunTask(run_request(), timeout=60)
    assert response.result.finish_reason == pb.FINISH_REASON_STOP
