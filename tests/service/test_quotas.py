"""Quotas of callers and fairness between them, through a real server."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.auth import ApiKeys
from service.client import CallError
from service.deadlines import Deadline
from service.engines.fake import FakeEngine
from service.errors import (
    EngineUnavailable,
    InferenceTimeout,
    InvalidRequest,
    OutputInvalid,
    OutputTruncated,
    Overloaded,
    QuotaExceeded,
)
from service.inference.admission import Admission
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.quotas import KEPT_ACCOUNTS, UNBOUNDED, Caller, Quota, Quotas
from service.runtime import Runtime
from service.settings import SettingsError
from service.types import GenerateRequest
from service.wiring import BUNDLED_MODEL
from tests.attacks.http2 import Connection
from tests.service.harness import Running, failure, image_bytes, inline, run_request, running, until
from tests.service.http_api.harness import serving

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def line(name: str, words: str = "") -> str:
    """The line of a caller whose key is ``key of NAME``."""
    return f"{name}:{hashlib.sha256(f'key of {name}'.encode()).hexdigest()} {words}\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """To be filled by the test."""
    return tmp_path / "keys"


def send(started: Running, caller: str, request: Any = None) -> Any:
    """One call of RunTask with the key of a caller."""
    metadata = (("x-api-key", f"key of {caller}"),)
    return started.stub.RunTask(request or run_request(), metadata=metadata, timeout=60)


async def refused(started: Running, caller: str, request: Any = None) -> CallError:
    """The error of a call that is above a quota."""
    error = await failure(send(started, caller, request))
    assert (error.code, error.reason) == (EXHAUSTED, "QUOTA_EXCEEDED")
    return error


class Held(FakeEngine):
    """Answers nobody between ``hold`` and ``release``.

    begun: the user texts since ``hold``, in the order in which their generation began.
    """

    def __init__(self) -> None:
        super().__init__(self._noted)
        self._gate = asyncio.Event()
        self.begun: list[str] = []
        self.release()

    def hold(self) -> None:
        self.begun.clear()
        self._gate.clear()

    def release(self) -> None:
        self._gate.set()

    def _noted(self, request: GenerateRequest) -> str:
        self.begun.append(request.user)
        return "an answer"

    async def _step(self, number: int) -> None:
        await self._gate.wait()


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stopped(server: Any) -> Clock:
    """The clock of the quotas of a server, which moves only when told to."""
    clock = Clock()
    server.runtime.budgets.quotas._clock = clock
    return clock


# The file


def read(keys: Path, text: str, default: Quota = UNBOUNDED) -> dict[str, Quota | None]:
    keys.write_text(text)
    found = ApiKeys.read(keys, default)
    names = [one.partition(":")[0] for one in text.split() if ":" in one]
    return {name: found.caller({"x-api-key": f"key of {name}"}).quota for name in names}


def test_quotas_stand_behind_the_key(keys: Path) -> None:
    text = (
        line("old")
        + line("phone", "concurrent=4 queue=0 requests_per_minute=60\ttokens_per_minute=1e6")
        + line("shop", "megapixels_per_minute=2.5")
    )
    assert read(keys, text) == {
        "old": None,
        "phone": Quota(concurrent=4, queue=0, requests_per_minute=60, tokens_per_minute=1e6),
        "shop": Quota(megapixels_per_minute=2.5),
    }


def test_defaults_are_for_what_a_line_leaves_open(keys: Path) -> None:
    text = (
        line("old")
        + line("phone", "queue=2")
        + line("shop", "queue=unlimited concurrent=unlimited")
    )
    assert read(keys, text, Quota(concurrent=8, queue=1)) == {
        "old": Quota(concurrent=8, queue=1),
        "phone": Quota(concurrent=8, queue=2),
        "shop": None,
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("concurrent=0", "concurrent=0 must be a whole number of at least 1, or unlimited"),
        ("concurrent=1.5", "concurrent=1.5 must be a whole number of at least 1, or unlimited"),
        ("queue=-1", "queue=-1 must be a whole number of at least 0, or unlimited"),
        (
            "tokens_per_minute=0",
            "tokens_per_minute=0 must be a number from 0.0001 to 1e+12, or unlimited",
        ),
        ("tokens_per_minute=nan", "tokens_per_minute=nan must be a number from 0.0001 to 1e+12"),
        ("tokens_per_minute=1e13", "tokens_per_minute=1e13 must be a number from 0.0001 to 1e+12"),
        ("tokens_per_minute=1e-300", "tokens_per_minute=1e-300 must be a number from 0.0001"),
        ("requests_per_minute=", "requests_per_minute= must be a number from 0.0001 to 1e+12"),
        ("queue=1 queue=2", "queue is set twice"),
        ("requests=5", "requests=… is not a quota; allowed: concurrent=, queue=, requests_per_"),
        ("queue=1 secret", "word 2 is not a quota; allowed: concurrent="),
        ("queue", "word 1 is not a quota"),
    ],
)
def test_wrong_quotas_are_named(keys: Path, words: str, says: str) -> None:
    keys.write_text(line("old") + line("phone", words))
    with pytest.raises(SettingsError) as refused:
        ApiKeys.read(keys)
    text = str(refused.value)
    assert text.startswith(f"api_keys_file: line 2: {says}")
    assert "secret" not in text


# Quotas


async def test_requests_per_minute(keys: Path) -> None:
    keys.write_text(line("phone", "requests_per_minute=2") + line("shop"))
    async with running(api_keys_file=keys) as started:
        stopped(started.server)
        for _ in range(2):
            await send(started, "phone")
        error = await refused(started, "phone")
        assert error.metadata["quota"] == "requests_per_minute"
        assert error.metadata["limit"] == "2"
        assert "2 requests per minute" in error.message
        assert error.retry_after_s == pytest.approx(30)
        await send(started, "shop")


async def test_a_caller_that_comes_back_when_told_is_served(keys: Path) -> None:
    keys.write_text(line("phone", "requests_per_minute=600"))
    async with running(api_keys_file=keys) as started:
        quotas = started.server.runtime.budgets.quotas
        clock = stopped(started.server)
        for _ in range(600):
            with quotas.use(Caller("phone", Quota(requests_per_minute=600)), 0):
                pass
        delays = [(await refused(started, "phone")).retry_after_s or 0.0 for _ in range(5)]
        assert delays == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5]), "not all at the same time"
        told = [clock.now + delay_s for delay_s in delays]
        for at in told:
            clock.now = at - 0.01
            await refused(started, "phone")
            clock.now = at
            await send(started, "phone")


async def test_every_method_of_inference_counts(keys: Path) -> None:
    keys.write_text(line("phone", "requests_per_minute=1"))
    async with running(api_keys_file=keys) as started:
        stopped(started.server)
        metadata = (("x-api-key", "key of phone"),)
        await send(started, "phone")
        grammar = inline(json_schema="{}").inline.grammar
        calls = [
            started.stub.ValidateSchema(
                pb.ValidateSchemaRequest(grammar=grammar), metadata=metadata
            ),
            started.stub.AnalyzeImage(
                pb.AnalyzeImageRequest(images=[pb.Image(data=image_bytes())]), metadata=metadata
            ),
        ]
        for call in calls:
            assert (await failure(call)).reason == "QUOTA_EXCEEDED"
        stream = started.stub.StreamTask(pb.StreamTaskRequest(task=inline()), metadata=metadata)
        assert (await failure(stream.read())).reason == "QUOTA_EXCEEDED"
        await started.stub.GetModel(pb.GetModelRequest(), metadata=metadata)


async def test_megapixels_per_minute_before_anything_is_decoded(keys: Path) -> None:
    keys.write_text(line("phone", "megapixels_per_minute=1.5"))
    async with running(api_keys_file=keys) as started:
        stopped(started.server)
        image = run_request(images=[image_bytes(1000, 500)])
        await send(started, "phone", image)
        too_much = run_request(images=[image_bytes(1000, 500)] * 3)
        error = await refused(started, "phone", too_much)
        assert (error.metadata["quota"], error.metadata["limit"]) == (
            "megapixels_per_minute",
            "1.5",
        )
        assert error.retry_after_s == pytest.approx(20), "0.5 megapixels are missing"
        await send(started, "phone")  # without an image
        await send(started, "phone", run_request(images=[image_bytes(1000, 500)] * 2))
        await refused(started, "phone", image)


async def test_a_request_above_a_whole_minute_needs_a_full_minute(keys: Path) -> None:
    keys.write_text(line("phone", "megapixels_per_minute=0.1"))
    async with running(api_keys_file=keys) as started:
        clock = stopped(started.server)
        image = run_request(images=[image_bytes(1000, 500)])
        await send(started, "phone", image)
        error = await refused(started, "phone", image)
        assert error.retry_after_s == pytest.approx(300, abs=0.01), "0.5 megapixels at 0.1 a minute"
        clock.now += 300
        await send(started, "phone", image)


async def test_tokens_are_counted_after_the_call(keys: Path) -> None:
    keys.write_text(line("phone", "tokens_per_minute=100"))
    async with running(FakeEngine("word " * 30), api_keys_file=keys) as started:
        clock = stopped(started.server)
        used = 0
        for _ in range(2):
            usage = (await send(started, "phone", run_request(max_tokens=40))).result.usage
            used += usage.prompt_tokens + usage.output_tokens
        error = await refused(started, "phone", run_request(max_tokens=40))
        assert error.metadata["quota"] == "tokens_per_minute"
        missing = 40 - (100 - used)
        assert error.retry_after_s == pytest.approx(missing * 0.6)
        await send(started, "phone", run_request(inline("x"), max_tokens=100 - used))
        clock.now += 60
        await send(started, "phone", run_request(max_tokens=40))


async def test_a_call_that_the_engine_never_saw_uses_no_tokens(keys: Path) -> None:
    keys.write_text(line("phone", "tokens_per_minute=100"))
    async with running(FakeEngine("word " * 30), api_keys_file=keys) as started:
        stopped(started.server)
        wrong = run_request(inline(json_schema='{"type": "nothing"}'), max_tokens=100)
        for _ in range(3):
            assert (await failure(send(started, "phone", wrong))).reason == "SCHEMA_INVALID"
        await send(started, "phone", run_request(max_tokens=100))


async def test_a_call_without_an_answer_uses_the_tokens_of_the_engine(keys: Path) -> None:
    keys.write_text(line("phone", "tokens_per_minute=1000") + line("shop"))
    engine = FakeEngine("word " * 30)
    async with running(engine, api_keys_file=keys) as started:
        stopped(started.server)
        prompt = (await send(started, "shop")).result.usage.prompt_tokens
        assert prompt > 1
        request = run_request(max_tokens=9)
        assert (await failure(send(started, "phone", request))).reason == "OUTPUT_TRUNCATED"
        left = 1000 - prompt - 9
        await refused(started, "phone", run_request(max_tokens=left + 1))

        engine.hang_after = 8
        metadata = (("x-api-key", "key of phone"),)
        streamed = pb.StreamTaskRequest(task=request.task, sampling=request.sampling)
        call = started.stub.StreamTask(streamed, metadata=metadata)
        text = ""
        while text.count("word") < 8:
            text += (await call.read()).delta
        call.cancel()
        account = started.server.runtime.budgets.quotas._accounts["phone"]
        await until(lambda: not account.calls, 60)
        assert account.tokens._level == left - prompt - 8


async def test_concurrent_calls(keys: Path) -> None:
    keys.write_text(line("phone", "concurrent=2") + line("shop"))
    engine = Held()
    async with running(engine, api_keys_file=keys) as started:
        engine.hold()
        calls = [asyncio.ensure_future(send(started, "phone")) for _ in range(2)]
        await until(lambda: len(engine.begun) == 2)
        error = await refused(started, "phone")
        assert (error.metadata["quota"], error.metadata["limit"]) == ("concurrent", "2")
        assert error.retry_after_s
        other = asyncio.ensure_future(send(started, "shop"))
        await until(lambda: len(engine.begun) == 3)
        engine.release()
        await asyncio.gather(*calls, other)
        await send(started, "phone")


async def test_calls_count_before_their_bodies_are_read(keys: Path) -> None:
    keys.write_text(line("phone", "concurrent=2") + line("shop"))
    async with running(api_keys_file=keys) as started:
        connection = await Connection.open("127.0.0.1", started.server.port)
        path = b"/qwen3vl.v1.VisionService/RunTask"
        for _ in range(2):
            connection.call(path, None, (b"x-api-key", b"key of phone"))
        await until(lambda: calls_of(started.server.runtime, "phone") == 2)
        error = await refused(started, "phone")
        assert error.metadata["quota"] == "concurrent"
        await send(started, "shop")
        await connection.close()
        await until(lambda: calls_of(started.server.runtime, "phone") == 0)
        await send(started, "phone")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/qwen3vl.v1.VisionService/RunTask"])
async def test_calls_over_http_count_before_their_bodies_are_read(keys: Path, path: str) -> None:
    keys.write_text(line("phone", "concurrent=1"))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: a\r\nx-api-key: key of phone\r\n"
        "content-type: application/json\r\ncontent-length: 2\r\n\r\n"
    ).encode()
    async with serving(api_keys_file=keys) as server:
        runtime = server.runtime
        _, first = await asyncio.open_connection("127.0.0.1", server.http.port)
        first.write(head)
        await until(lambda: calls_of(runtime, "phone") == 1)
        reader, second = await asyncio.open_connection("127.0.0.1", server.http.port)
        second.write(head)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 30)
        assert b" 429 " in answer
        first.close()
        await until(lambda: calls_of(runtime, "phone") == 0)
        second.close()


def calls_of(runtime: Runtime, caller: str) -> int:
    """Calls of a caller in the server."""
    account = runtime.budgets.quotas._accounts.get(caller)
    return 0 if account is None else account.calls


async def test_a_call_that_is_cancelled_no_longer_counts(keys: Path) -> None:
    keys.write_text(line("phone", "concurrent=1"))
    engine = Held()
    async with running(engine, api_keys_file=keys) as started:
        engine.hold()
        call = send(started, "phone")
        await until(lambda: len(engine.begun) == 1)
        call.cancel()
        await until(lambda: engine.cancelled_requests == 1)
        engine.release()
        await send(started, "phone")


@pytest.mark.slow
async def test_few_calls_wait_in_the_engine_where_order_is_by_arrival(keys: Path) -> None:
    """One key fills the server with long calls; the short call of another key is next but a few."""
    from service.engines.reference import ReferenceEngine

    keys.write_text(line("phone") + line("shop"))
    engine: Any = ReferenceEngine(BUNDLED_MODEL, max_batch=2)
    async with running(engine, api_keys_file=keys, max_batch=2) as started:
        long, short = (run_request(inline(regex=f"[a-z]{{{n}}}")) for n in (250, 5))
        calls = [asyncio.ensure_future(send(started, "phone", long)) for _ in range(12)]
        admission = started.server.runtime.budgets.admission
        await until(lambda: admission.waiting >= 8)
        ended = sum(call.done() for call in calls)
        await send(started, "shop", short)
        before = sum(call.done() for call in calls) - ended
        await asyncio.gather(*calls)
    assert before <= 6


async def test_share_of_the_queue(keys: Path) -> None:
    keys.write_text(line("phone", "queue=1") + line("shop"))
    engine = Held()
    async with running(engine, api_keys_file=keys, max_concurrent=1, max_queue=3) as started:
        engine.hold()
        admission = started.server.runtime.budgets.admission
        calls = [asyncio.ensure_future(send(started, "phone")) for _ in range(2)]
        await until(lambda: (admission.active, admission.waiting) == (1, 1))
        error = await refused(started, "phone")
        assert (error.metadata["quota"], error.metadata["limit"]) == ("queue", "1")
        calls += [asyncio.ensure_future(send(started, "shop")) for _ in range(2)]
        await until(lambda: admission.waiting == 3)
        engine.release()
        await asyncio.gather(*calls)


async def test_defaults_of_the_server(keys: Path) -> None:
    keys.write_text(line("phone") + line("shop", "requests_per_minute=2"))
    async with running(api_keys_file=keys, key_requests_per_minute=1) as started:
        stopped(started.server)
        await send(started, "phone")
        assert (await refused(started, "phone")).metadata["limit"] == "1"
        await send(started, "shop")
        await send(started, "shop")
        assert (await refused(started, "shop")).metadata["limit"] == "2"


async def test_a_quota_holds_over_every_front_end_together(keys: Path) -> None:
    keys.write_text(line("phone", "requests_per_minute=2") + line("shop"))
    async with serving(api_keys_file=keys) as server:
        stopped(server)
        key = {"authorization": "Bearer key of phone"}
        assert (await server.chat(key)).status == 200
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc.port}") as channel:
            stub = VisionServiceStub(channel)
            metadata = (("x-api-key", "key of phone"),)
            await stub.RunTask(run_request(), metadata=metadata, timeout=60)
            error = await failure(stub.RunTask(run_request(), metadata=metadata, timeout=60))
        assert error.reason == "QUOTA_EXCEEDED"
        reply = await server.chat(key)
        assert reply.status == 429
        assert 30 < int(reply.headers["retry-after"]) <= 60, (
            "behind the call that was refused before"
        )
        assert (await server.chat({"authorization": "Bearer key of shop"})).status == 200


# Fairness


async def test_one_caller_cannot_keep_another_out(keys: Path) -> None:
    """330 calls of one key fill slots and queue; 12 of another key are answered, and next."""
    keys.write_text(line("many") + line("few"))
    engine = Held()
    async with running(engine, api_keys_file=keys, max_concurrent=64) as started:
        engine.hold()
        admission = started.server.runtime.budgets.admission

        async def call(caller: str) -> str:
            try:
                await send(started, caller, run_request(inline(caller)))
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        many = [asyncio.ensure_future(call("many")) for _ in range(330)]
        await until(lambda: sum(one.done() for one in many) == 10, 60)
        assert (admission.active, admission.waiting) == (64, 256)
        few = [asyncio.ensure_future(call("few")) for _ in range(12)]
        await until(lambda: admission._queue.waiting("few") == 12, 60)
        assert admission.waiting == 256
        engine.release()
        assert await asyncio.gather(*few) == ["OK"] * 12
        assert Counter(await asyncio.gather(*many)) == {"OK": 308, "RESOURCE_EXHAUSTED": 22}
        assert engine.begun[:64] == ["many"] * 64
        assert engine.begun[64:76] == ["few"] * 12


async def test_without_keys_calls_are_served_as_they_come() -> None:
    engine = Held()
    async with running(engine, max_concurrent=1, max_queue=3) as started:
        engine.hold()
        admission = started.server.runtime.budgets.admission
        calls = []
        for number in range(4):
            request = run_request(inline(str(number)))
            calls.append(asyncio.ensure_future(started.stub.RunTask(request)))
            await until(lambda: admission.active + admission.waiting == len(calls))
        assert (await failure(started.stub.RunTask(run_request()))).reason == "OVERLOADED"
        engine.release()
        await asyncio.gather(*calls)
        assert engine.begun == ["0", "1", "2", "3"]


async def test_where_nothing_may_wait_one_caller_leaves_room_for_others() -> None:
    admission = Admission(max_concurrent=16, max_queue=0)
    async with AsyncExitStack() as stack:

        async def slots(caller: str) -> int:
            for number in range(17):
                try:
                    await stack.enter_async_context(admission.slot(Deadline(5), Caller(caller)))
                except Overloaded:
                    return number
            raise AssertionError("no end")

        assert [await slots("a"), await slots("b"), await slots("c")] == [14, 2, 0]


# Accounts


def exceeded(quotas: Quotas, caller: Caller, tokens: int = 0) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as refused, quotas.use(caller, tokens):
        pass
    return refused.value


def test_a_refused_call_uses_nothing() -> None:
    quotas = Quotas(Clock())
    caller = Caller("a", Quota(requests_per_minute=1, tokens_per_minute=10))
    with quotas.use(caller, 8) as use:
        assert exceeded(quotas, caller, 8).metadata["quota"] == "requests_per_minute"
        use.spend_tokens(3)
    other = Caller("b", Quota(requests_per_minute=2, tokens_per_minute=10))
    with quotas.use(other, 8):
        assert exceeded(quotas, other, 8).metadata["quota"] == "tokens_per_minute"
        with quotas.use(other, 1):
            pass


@pytest.mark.parametrize(
    ("error", "generated", "tokens_left", "requests_left"),
    [
        (Overloaded("full", retry_after_s=1), 0, 10, 2),
        (Overloaded("full", retry_after_s=1), 3, 7, 1),  # in a second attempt
        (EngineUnavailable("gone"), 0, 10, 1),
        (EngineUnavailable("gone"), 3, 7, 1),
        (InvalidRequest("images", "wrong"), 0, 10, 1),
        (OutputTruncated("cut"), 0, 4, 1),
        (OutputTruncated("cut"), 8, 2, 1),
        (OutputInvalid("wrong"), 8, 2, 1),
        (InferenceTimeout("late"), 8, 2, 1),
        (asyncio.CancelledError(), 0, 4, 1),
        (asyncio.CancelledError(), 8, 2, 1),
    ],
)
def test_what_a_failed_call_uses(
    error: BaseException, generated: int, tokens_left: int, requests_left: int
) -> None:
    quotas = Quotas(Clock())
    quota = Quota(requests_per_minute=2, tokens_per_minute=10, megapixels_per_minute=1)
    caller = Caller("a", quota)

    def fail() -> None:
        with quotas.use(caller, 6, lambda: generated) as use:
            use.spend_pixels(1_000_000)
            raise error

    with pytest.raises(type(error)):
        fail()
    if tokens_left < 10:
        exceeded(quotas, caller, tokens_left + 1)
    with quotas.use(caller, tokens_left) as use:
        if requests_left == 2:
            use.spend_pixels(1_000_000)
        else:
            with pytest.raises(QuotaExceeded):
                use.spend_pixels(1)
    if requests_left == 1:
        assert exceeded(quotas, caller).metadata["quota"] == "requests_per_minute"


def test_a_changed_quota_holds_at_once() -> None:
    quotas = Quotas(clock := Clock())
    for _ in range(10):
        with quotas.use(Caller("a", Quota(requests_per_minute=10)), 0):
            pass
    exceeded(quotas, Caller("a", Quota(requests_per_minute=10)))
    clock.now += 60
    with quotas.use(Caller("a", Quota(requests_per_minute=1)), 0):
        pass
    exceeded(quotas, Caller("a", Quota(requests_per_minute=1)))


def test_accounts_that_owe_nothing_are_forgotten() -> None:
    quotas = Quotas(clock := Clock())
    quota = Quota(requests_per_minute=1)

    def call(names: Sequence[str]) -> None:
        for name in names:
            with quotas.use(Caller(name, quota), 0):
                pass

    call([f"old {number}" for number in range(KEPT_ACCOUNTS)])
    clock.now += 60
    with quotas.use(Caller("running", quota), 0):
        call(["new"])
        assert len(quotas._accounts) == 2
    exceeded(quotas, Caller("new", quota))


def test_an_answer_that_its_caller_leaves_early_uses_what_it_took() -> None:
    quotas = Quotas(Clock())
    caller = Caller("a", Quota(tokens_per_minute=10))

    def leave() -> None:
        with quotas.use(caller, 8, lambda: 3) as use:
            use.spend_tokens(3)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave()
    with quotas.use(caller, 7):
        exceeded(quotas, caller, 1)


@pytest.mark.slow
def test_each_account_is_judged_by_its_own_quota() -> None:
    """A caller with a higher rate does not let one with a lower rate begin anew."""
    quotas = Quotas(clock := Clock())
    slow = Caller("slow", Quota(requests_per_minute=1))
    with quotas.use(slow, 0):
        pass
    quick = Quota(tokens_per_minute=10)
    for number in range(KEPT_ACCOUNTS):
        with quotas.use(Caller(f"quick {number}", quick), 0):
            pass
    clock.now += 30
    with quotas.use(Caller("new", quick), 0):
        pass
    assert len(quotas._accounts) == 3, "slow, the last of the quick ones, and new"
    exceeded(quotas, slow)


def test_accounts_are_bounded_even_where_all_of_them_owe() -> None:
    quotas = Quotas(Clock())
    quota = Quota(requests_per_minute=1)
    running = quotas.use(Caller("running", quota), 0)
    running.__enter__()
    for number in range(KEPT_ACCOUNTS + 10):
        with quotas.use(Caller(str(number), quota), 0):
            pass
    assert len(quotas._accounts) == KEPT_ACCOUNTS
    assert "running" in quotas._accounts, "a call that runs keeps its account"
    assert "0" not in quotas._accounts
    running.__exit__(None, None, None)


def test_calls_above_the_number_at_the_same_time_are_told_different_times() -> None:
    """At the same time, only as many would find a place as end in the meantime."""
    quotas = Quotas(clock := Clock())
    caller = Caller("a", Quota(concurrent=2))
    leave = [quotas.enter(caller) for _ in range(2)]
    clock.now += 4
    for one in leave:
        one()
        one()  # once more changes nothing
    held = [quotas.enter(caller) for _ in range(2)]
    mean_s = quotas._accounts["a"].mean_s
    assert mean_s > 1

    def told() -> float:
        with pytest.raises(QuotaExceeded) as refused:
            quotas.enter(caller)
        return refused.value.retry_after_s

    times = [told() for _ in range(10)]
    assert times[-1] >= 10 * mean_s / 2, "ten calls before it, two in each mean time"
    assert times[-1] <= 1.25 * 11 * mean_s / 2
    for _ in range(1000):
        last = told()
    assert 60 <= last <= 75
    held[0]()
    quotas.enter(caller)


def test_nobody_is_told_to_come_again_after_more_than_a_day() -> None:
    quotas = Quotas(Clock())
    caller = Caller("a", Quota(megapixels_per_minute=1e-4))
    with quotas.use(caller, 0) as use:
        use.spend_pixels(64_000_000)
    with pytest.raises(QuotaExceeded) as refused, quotas.use(caller, 0) as use:
        use.spend_pixels(1)
    assert refused.value.retry_after_s == 86_400
