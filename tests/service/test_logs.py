"""The log: one line per event, the request id in each, and nothing that callers sent."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator

import grpc
import pytest

from service import logs
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import (
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    stream_failure,
    until,
)


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a program that calls ``logs.configure`` writes; our own part as talkative as can be."""
    root, ours, text = logging.getLogger(), logging.getLogger("service"), io.StringIO()
    before, level = root.handlers[:], root.level
    logs.configure()
    ours.setLevel(logging.DEBUG)
    [handler] = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    yield text
    root.handlers[:] = before
    root.setLevel(level)
    ours.setLevel(logging.NOTSET)


def test_pairs() -> None:
    assert logs.pairs(a=1, b="plain", seconds=0.123456) == "a=1 b=plain seconds=0.1235"
    assert (
        logs.pairs(a="two words", b="", c='q"', d="x=y") == """a='two words' b='' c='q"' d='x=y'"""
    )


def test_a_value_cannot_forge_a_line() -> None:
    text = logs.pairs(name="x\nlevel=info forged", other="\x1b[31m")
    assert "\n" not in text
    assert "\x1b" not in text


def test_a_line(written: io.StringIO) -> None:
    logging.getLogger("service.thing").warning("it happened %s", logs.pairs(n=1))
    token = logs.request_id.set("id-1")
    try:
        logging.getLogger("service.thing").info("again")
    finally:
        logs.request_id.reset(token)
    first, second = written.getvalue().splitlines()
    assert first.startswith("time=20")
    assert first.endswith("Z level=warning logger=service.thing request_id=- it happened n=1")
    assert second.endswith("level=info logger=service.thing request_id=id-1 again")


def test_a_traceback_follows_its_line(written: io.StringIO) -> None:
    try:
        raise OSError("broken")
    except OSError:
        logging.getLogger("service.thing").exception("it failed")
    lines = written.getvalue().splitlines()
    assert lines[0].endswith("it failed")
    assert lines[-1] == "OSError: broken"


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "service.access"]


async def test_every_kind_of_call_leaves_exactly_one_access_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    engine = FakeEngine()
    async with running(engine) as started:
        stub = started.stub
        stream = pb.StreamTaskRequest(task=inline())
        await stub.RunTask(run_request(), timeout=5)
        _ = [event async for event in stub.StreamTask(stream, timeout=5)]
        await stub.GetModel(pb.GetModelRequest(), timeout=5)
        await failure(started.raw("RunTask", b"\xff"))
        engine.crash_after = 1
        await failure(stub.RunTask(run_request(), timeout=5))
        await stream_failure(stub.StreamTask(stream, timeout=5))
        engine.crash_after, engine.hang_after = None, 1
        call = stub.RunTask(run_request(), timeout=5)
        await until(lambda: engine.active_requests == 1)
        call.cancel()
        await until(lambda: len(access_lines(caplog)) == 7)
    found = [
        tuple(pair.partition("=")[2].rpartition("/")[2] for pair in line.split()[1:4])
        for line in access_lines(caplog)
    ]
    assert found == [
        ("RunTask", "OK", "-"),
        ("StreamTask", "OK", "-"),
        ("GetModel", "OK", "-"),
        ("RunTask", "INVALID_ARGUMENT", "MALFORMED_REQUEST"),
        ("RunTask", "INTERNAL", "INTERNAL"),
        ("StreamTask", "INTERNAL", "INTERNAL"),
        ("RunTask", "CANCELLED", "-"),
    ]
    assert all(" seconds=0." in line and " peer=" in line for line in access_lines(caplog))


async def test_every_line_of_a_call_has_its_request_id(written: io.StringIO) -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.crash_after = 0
        metadata = (("x-request-id", "order-66"),)
        await failure(started.stub.RunTask(run_request(), timeout=5, metadata=metadata))
    events = [line for line in written.getvalue().splitlines() if line.startswith("time=")]
    lines = [line for line in events if "method=" in line]
    assert len(lines) == 2  # what failed, with its traceback below, and the access line
    assert all(" request_id=order-66 " in line for line in lines)


async def test_what_callers_send_and_get_stays_out_of_the_log(written: io.StringIO) -> None:
    secret = "Xyzzy"  # in the prompt, the schema, the task name, the answer
    schema = json.dumps({"type": "object", "properties": {secret: {"type": "integer"}}})
    data = image_bytes(32, 32, "PNG")
    engine = FakeEngine(json.dumps({secret: "not a number"}))
    async with running(engine) as started:
        for request in (
            run_request(inline(secret, json_schema=schema), [data]),
            run_request(inline(secret), [data]),
            run_request(inline(secret, json_schema="{" + secret)),
            run_request(inline(secret, regex="(" + secret)),
            run_request(inline(secret), [data[:-50]]),
            run_request(inline(secret), [secret.encode()]),
            run_request(pb.Task(name=secret)),
            run_request(inline(secret), max_tokens=1),
        ):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await started.stub.RunTask(request, timeout=5)
    text = written.getvalue()
    assert text.count("logger=service.access") == 8
    assert secret not in text
    assert "IHDR" not in text
    assert repr(data[:8])[2:-1] not in text
