"""The line of a call, as pairs and as JSON; lines left out; raw answers on demand."""

from __future__ import annotations

import json
import logging

import pytest

from service import logs
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.harness import failure, image_bytes, inline, run_request, running, until
from tests.service.http_api.harness import serving

ASKS = (("x-log-output", "1"),)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Records of the access log and of raw answers."""
    caplog.set_level(logging.INFO, "service.access")
    caplog.set_level(logging.DEBUG, logs.OUTPUT_LOGGER)
    return caplog


def of(lines: pytest.LogCaptureFixture, name: str = "service.access") -> list[str]:
    return [one.getMessage() for one in lines.records if one.name == name]


async def test_a_line_says_what_a_call_took(lines: pytest.LogCaptureFixture) -> None:
    image = image_bytes(64, 48)
    async with running(FakeEngine("one two three")) as started:
        answer = await started.stub.RunTask(run_request(images=[image]), timeout=60)
        await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
    long, short = of(lines)
    found = dict(pair.split("=", 1) for pair in long.split()[1:])
    assert found.pop("peer").startswith(("ipv4:", "ipv6:"))
    times = [float(found.pop(name)) for name in ("queued_s", "first_token_s", "seconds")]
    assert 0 <= times[0] <= times[1] <= times[2]
    usage = answer.result.usage
    assert found == {
        "method": "/qwen3vl.v1.VisionService/RunTask",
        "code": "OK",
        "reason": "-",
        "caller": "-",
        "model": "fake",
        "task": "inline",
        "images": "1",
        "pixels": str(64 * 48),
        "image_bytes": str(len(image)),
        "prompt_tokens": str(usage.prompt_tokens),
        "image_tokens": str(usage.image_tokens),
        "output_tokens": str(usage.output_tokens),
        "attempts": "1",
        "finish_reason": "stop",
    }
    assert [pair.partition("=")[0] for pair in short.split()[1:]] == [
        "method", "code", "reason", "seconds", "caller", "peer",
    ]  # fmt: skip


async def test_a_line_in_json(lines: pytest.LogCaptureFixture) -> None:
    async with running() as started:
        await failure(started.stub.RunTask(run_request(pb.Task(name="none")), timeout=60))
        await until(lambda: bool(of(lines)))
    [record] = [one for one in lines.records if one.name == "service.access"]
    found = json.loads(logs.JsonFormatter().format(record))
    assert found["message"] == "call"
    assert (found["code"], found["reason"]) == ("NOT_FOUND", "UNKNOWN_TASK")
    assert isinstance(found["seconds"], float)


async def test_of_calls_that_succeed_one_of_many_leaves_a_line(
    lines: pytest.LogCaptureFixture,
) -> None:
    async with running(log_every=3) as started:
        for _ in range(7):
            await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        for _ in range(2):
            await failure(started.stub.RunTask(run_request(pb.Task(name="none")), timeout=60))
    codes = [line.split()[2] for line in of(lines)]
    assert codes == ["code=OK", "code=OK", "code=NOT_FOUND", "code=NOT_FOUND"]


async def test_a_raw_answer_on_demand(lines: pytest.LogCaptureFixture) -> None:
    schema = '{"type": "array", "items": {"type": "integer"}, "uniqueItems": true, "maxItems": 4}'
    async with running(FakeEngine("[1, 1]"), log_output=True, output_retries=1) as started:
        request = run_request(inline(json_schema=schema), temperature=1.0)
        await failure(started.stub.RunTask(request, timeout=60))
        await failure(started.stub.RunTask(request, timeout=60, metadata=(("x-log-output", "0"),)))
        assert not of(lines, logs.OUTPUT_LOGGER)
        await failure(started.stub.RunTask(request, timeout=60, metadata=ASKS))
        said = of(lines, logs.OUTPUT_LOGGER)
        ended = "output finish_reason=invalid text='[1, 1]'"
        assert said == [ended] * 2, "one of each attempt, which ends at the violation"
        stream = pb.StreamTaskRequest(task=inline())
        _ = [one async for one in started.stub.StreamTask(stream, timeout=60, metadata=ASKS)]
        assert of(lines, logs.OUTPUT_LOGGER)[2:] == ["output finish_reason=stop text='[1, 1]'"]
    assert {one.levelname for one in lines.records if one.name == logs.OUTPUT_LOGGER} == {"DEBUG"}


async def test_http_leaves_the_same_line(lines: pytest.LogCaptureFixture) -> None:
    async with serving(log_output=True) as served:
        await served.chat(dict(ASKS))
        await served.request("GET", "/v1/models")
    chat, models = [dict(pair.split("=", 1) for pair in one.split()[1:]) for one in of(lines)]
    assert (chat["code"], chat["attempts"], chat["finish_reason"]) == ("OK", "1", "stop")
    assert chat["peer"].startswith("127.0.0.1:")
    assert (models["code"], "attempts" in models) == ("OK", False)
    assert len(of(lines, logs.OUTPUT_LOGGER)) == 1


async def test_no_raw_answer_unless_the_operator_allows_it(
    lines: pytest.LogCaptureFixture,
) -> None:
    async with running() as started:
        await started.stub.RunTask(run_request(), timeout=60, metadata=ASKS)
    assert not of(lines, logs.OUTPUT_LOGGER)
