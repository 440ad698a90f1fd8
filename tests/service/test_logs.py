"""The log: one line per event, the request id in each, and nothing that callers sent."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from service import logs, metrics
from service.engines.fake import FakeEngine
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.service.cli.terminal import process, wait_for
from tests.service.harness import (
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    stream_failure,
    until,
)


class Written:
    """What has been written to the log so far."""

    def __init__(self) -> None:
        self._data = io.BytesIO()
        self.write = self._data.write

    def getvalue(self) -> str:
        assert logs.flush(limit_s=30)
        return self._data.getvalue().decode()


@pytest.fixture
def levels() -> Iterator[None]:
    """Puts the loggers back as they were."""
    named = [logging.getLogger(name) for name in ("", *logs.OURS, logs.console.name)]
    root, before = named[0], [(one, one.level) for one in named]
    handlers = root.handlers[:]
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    for one, level in before:
        one.setLevel(level)


@pytest.fixture
def written(levels: None) -> Written:
    """What a program that calls ``logs.configure`` writes; our own part as talkative as can be."""
    found = Written()
    logs.configure("debug", write=found.write)
    return found


def test_pairs() -> None:
    assert logs.pairs(a=1, b="plain", seconds=0.123456) == "a=1 b=plain seconds=0.1235"
    assert (
        logs.pairs(a="two words", b="", c='q"', d="x=y") == """a='two words' b='' c='q"' d='x=y'"""
    )


def test_a_value_cannot_forge_a_line() -> None:
    text = logs.pairs(name="x\nlevel=info forged", other="\x1b[31m")
    assert "\n" not in text
    assert "\x1b" not in text


def test_a_line(written: Written) -> None:
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


def test_a_traceback_follows_its_line(written: Written) -> None:
    try:
        raise OSError("broken")
    except OSError:
        logging.getLogger("service.thing").exception("it failed")
    lines = written.getvalue().splitlines()
    assert lines[0].endswith("it failed")
    assert lines[-1] == "OSError: broken"


def test_json_lines(levels: None) -> None:
    found = Written()
    logs.configure("info", "json", write=found.write)
    thing = logging.getLogger("service.thing")
    thing.warning("it happened %s", logs.pairs(n=1, text='two "words"\nforged'))
    token = logs.request_id.set("id-1")
    thing.info("100%% of %s, %d", "é", 2)
    logs.request_id.reset(token)
    try:
        raise OSError("broken")
    except OSError:
        logging.getLogger("other").exception("it failed")
    thing.debug("not written")
    logs.console.info("SERVING")
    first, second, third, fourth = map(json.loads, found.getvalue().splitlines())
    assert first.pop("time").startswith("20")
    assert first == {
        "level": "warning",
        "logger": "service.thing",
        "request_id": "-",
        "message": "it happened",
        "n": 1,
        "text": 'two "words"\nforged',
    }
    assert (second["message"], second["request_id"]) == ("100% of é, 2", "id-1")
    assert third["message"] == "it failed"
    assert third["exception"].endswith("OSError: broken")
    assert fourth["message"] == "SERVING"


@pytest.mark.parametrize(
    ("form", "expected"),
    [("pairs", b"\\u2026 \\xe9t\\xe9\n"), ("json", b'"message": "\\u2026 \\u00e9t\\u00e9"}\n')],
)
def test_stderr_that_is_not_utf_8(form: str, expected: bytes) -> None:
    code = f"from service import logs; logs.configure('info', {form!r}); logs.console.info('… été')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stderr.endswith(expected)


def test_levels(levels: None) -> None:
    """Debug is for our own loggers: libraries write there what callers sent."""
    found = Written()
    logs.configure("debug", write=found.write)
    logging.getLogger("service.thing").debug("ours")
    logging.getLogger("PIL.PngImagePlugin").debug("theirs")
    assert "ours" in found.getvalue()
    assert "theirs" not in found.getvalue()
    logs.configure("error", write=found.write)
    logging.getLogger("service.thing").warning("a warning")
    logging.getLogger("service.thing").error("an error")
    logs.console.info("SERVING")
    last = found.getvalue().splitlines()[-2:]
    assert last[0].endswith("an error")
    assert last[1] == "SERVING"


class Stuck:
    """Stderr that nobody reads until ``read`` is set."""

    def __init__(self) -> None:
        self.read = threading.Event()
        self.stuck = threading.Event()
        self.text = ""

    def write(self, data: bytes) -> None:
        self.stuck.set()
        self.read.wait()
        self.text += data.decode()


def test_lines_that_come_together_are_written_together(
    levels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer wakes once for the lines of many calls."""
    woken, said, writes = threading.Event(), threading.Event(), list[bytes]()

    def gather(_: float) -> None:
        woken.set()
        said.wait(30)

    monkeypatch.setattr(logs.time, "sleep", gather)
    logs.configure(write=lambda data: (woken.set(), writes.append(data)))
    logs.log.warning("the first")
    assert woken.wait(30)
    logs.log.warning("the second")
    said.set()
    assert logs.flush(limit_s=30)
    (text,) = writes
    assert text.count(b"\n") == 2


async def test_a_log_that_nobody_reads_costs_lines_and_no_calls(
    levels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "QUEUE_LINES", 40)
    stderr = Stuck()
    before = dropped_lines()
    logs.configure(on_drop=metrics.log_lines_dropped.inc, write=stderr.write)
    log = logging.getLogger("service.thing")
    log.info("first")
    assert await asyncio.to_thread(stderr.stuck.wait, 30)
    async with running() as started:
        for _ in range(150):
            await started.stub.GetModel(pb.GetModelRequest(), timeout=30)
        dropped = dropped_lines() - before
        assert dropped >= 100
        assert not await asyncio.to_thread(logs.flush, 0.05)
        stderr.read.set()
        assert await asyncio.to_thread(logs.flush, 30)
        log.info("last")
        assert await asyncio.to_thread(logs.flush, 30)
    assert dropped_lines() - before == dropped
    lines = stderr.text.splitlines()
    told = [line for line in lines if "lines were dropped" in line]
    assert [line.rpartition(" ")[2] for line in told] == [f"lines={dropped:g}"]
    calls = sum("logger=service.access" in line for line in lines)
    others = sum("logger=service." in line for line in lines) - calls - len(told)
    assert calls < 150
    assert lines.index(told[0]) < next(i for i, line in enumerate(lines) if line.endswith("last"))
    assert calls + others + dropped >= 152


def dropped_lines() -> float:
    return REGISTRY.get_sample_value("qwen3vl_log_lines_dropped_total") or 0.0


@pytest.mark.slow  # thousands of calls
@pytest.mark.parametrize("read_at_the_end", [True, False])
def test_a_server_whose_stderr_nobody_reads(read_at_the_end: bool) -> None:
    """A pipe takes 64 KiB, some 250 lines; the call after that waited for ever."""
    calls = logs.QUEUE_LINES + 2000
    with process("serve", "--engine", "fake", "--port", 0) as server:
        assert server.stderr is not None
        port = int(wait_for(server.stderr, "SERVING on port ")[-1].split()[3].rstrip("."))
        asyncio.run(call_often(f"127.0.0.1:{port}", calls))
        if read_at_the_end:
            text: list[str] = []
            reader = threading.Thread(target=lambda: text.extend(server.stderr or ()))
            reader.start()
            asyncio.run(call_often(f"127.0.0.1:{port}", 10))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        if read_at_the_end:
            reader.join(60)
            [told] = [line for line in text if "log lines were dropped" in line]
            assert int(told.rpartition("=")[2]) + sum("method=" in line for line in text) > calls
            assert " stopped " in text[-1]


async def call_often(address: str, times: int) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = VisionServiceStub(channel)
        for _ in range(times // 50 + 1):
            await asyncio.gather(
                *(stub.GetModel(pb.GetModelRequest(), timeout=60) for _ in range(50))
            )


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
        await stub.RunTask(run_request(), timeout=60)
        _ = [event async for event in stub.StreamTask(stream, timeout=60)]
        await stub.GetModel(pb.GetModelRequest(), timeout=60)
        await failure(started.raw("RunTask", b"\xff"))
        engine.crash_after = 1
        await failure(stub.RunTask(run_request(), timeout=60))
        await stream_failure(stub.StreamTask(stream, timeout=60))
        engine.crash_after, engine.hang_after = None, 1
        call = stub.RunTask(run_request(), timeout=60)
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
    assert all(
        re.search(r" seconds=\d+\.\d", line) and " peer=" in line for line in access_lines(caplog)
    )


async def test_every_line_of_a_call_has_its_request_id(written: Written) -> None:
    engine = FakeEngine()
    async with running(engine) as started:
        engine.crash_after = 0
        metadata = (("x-request-id", "order-66"),)
        await failure(started.stub.RunTask(run_request(), timeout=60, metadata=metadata))
    events = [line for line in written.getvalue().splitlines() if line.startswith("time=")]
    lines = [line for line in events if "method=" in line]
    assert len(lines) == 2  # what failed, with its traceback below, and the access line
    assert all(" request_id=order-66 " in line for line in lines)


async def test_what_callers_send_and_get_stays_out_of_the_log(written: Written) -> None:
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
                await started.stub.RunTask(request, timeout=60)
    text = written.getvalue()
    assert text.count("logger=service.access") == 8
    assert secret not in text
    assert "IHDR" not in text
    assert repr(data[:8])[2:-1] not in text


@pytest.mark.slow
def test_a_signal_writes_the_stack_of_every_thread_and_the_server_goes_on() -> None:
    with process("serve", "--engine", "fake", "--port", 0) as server:
        assert server.stderr is not None
        wait_for(server.stderr, "SERVING on port ")
        server.send_signal(signal.SIGUSR1)
        dump = wait_for(server.stderr, "in main\n")
        assert any("Current thread" in line for line in dump)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
