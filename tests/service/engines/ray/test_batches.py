"""How chunks are collected before they cross."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext
from dataclasses import replace

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from service import metrics
from service.engines.fake import FakeEngine
from service.engines.ray import collecting
from service.engines.ray import engine as ray_engine
from service.engines.ray.collecting import Room
from service.engines.ray.link import LinkLost, NoRoom
from service.engines.ray.messages import Batch, ReplicaError, as_value
from service.engines.ray.registrar import Report
from service.engines.ray.replica import Replica
from service.errors import (
    ContextTooLong,
    EngineUnavailable,
    InferenceTimeout,
    Overloaded,
    ServiceError,
)
from service.types import Chunk, FinishReason, GenerateRequest, Timings, Usage
from tests.service.engines.ray.clusters import on_ray

LAST = Chunk("", FinishReason.STOP)
NEVER = 3600.0


async def at_once(*texts: str, error: Exception | None = None) -> AsyncIterator[Chunk]:
    for text in texts:
        yield Chunk(text)
    if error is not None:
        raise error
    yield LAST


class Told:
    """Chunks that come when the test says so."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Chunk] = asyncio.Queue()
        self.closed = False

    async def chunks(self) -> AsyncIterator[Chunk]:
        try:
            while (chunk := await self.queue.get()) is not LAST:
                yield chunk
            yield LAST
        finally:
            self.closed = True

    def say(self, *texts: str) -> None:
        for text in texts:
            self.queue.put_nowait(Chunk(text))


async def batches(
    chunks: AsyncIterator[Chunk], delay_s: float | None, deadline: float | None = None
) -> AsyncGenerator[tuple[list[Chunk], Exception | None], None]:
    """The batches of an answer; without ``delay_s`` nobody reads it piecewise."""
    packed = pickle.dumps(GenerateRequest("test", "?", piecewise=delay_s is not None))
    left_s = None if deadline is None else deadline - asyncio.get_running_loop().time()
    found = collecting.batches(lambda request: chunks, packed, left_s, delay_s or 0.0)
    async with aclosing(found):
        async for batch in found:
            yield batch.chunks, batch.error


def texts(chunks: list[Chunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


async def test_an_answer_that_is_there_crosses_at_once() -> None:
    found = [one async for one in batches(at_once("a", "b"), NEVER)]
    assert [(texts(chunks), error) for chunks, error in found] == [(["a", "b", ""], None)]


async def test_the_first_text_is_not_held_back_and_the_rest_is() -> None:
    told = Told()
    async with aclosing(batches(told.chunks(), NEVER)) as found:
        told.say("a")
        assert texts((await anext(found))[0]) == ["a"]
        second = asyncio.ensure_future(anext(found))
        for text in "bcd":
            told.say(text)
            await asyncio.sleep(0.01)
        assert not second.done()
        told.queue.put_nowait(LAST)
        assert texts((await second)[0]) == ["b", "c", "d", ""]


async def test_the_rest_is_held_back_for_the_delay_alone() -> None:
    told = Told()
    async with aclosing(batches(told.chunks(), 0.05)) as found:
        told.say("a")
        await anext(found)
        told.say("b", "c", "d")
        assert texts((await asyncio.wait_for(anext(found), 60))[0]) == ["b", "c", "d"]


async def test_the_end_is_not_held_back() -> None:
    told = Told()
    async with aclosing(batches(told.chunks(), NEVER)) as found:
        told.say("a")
        await anext(found)
        told.say("b")
        told.queue.put_nowait(LAST)
        chunks, error = await asyncio.wait_for(anext(found), 60)
        assert (texts(chunks), error) == (["b", ""], None)
        assert Batch(chunks, error, 0.0).last


async def test_chunks_before_an_error_are_not_lost() -> None:
    wrong = ContextTooLong("task", "is too long")
    found = [one async for one in batches(at_once("a", error=wrong), NEVER)]
    assert [(texts(chunks), error) for chunks, error in found] == [(["a"], wrong)]


async def test_closing_closes_the_iterator_of_the_engine() -> None:
    told = Told()
    found = batches(told.chunks(), NEVER)
    told.say("a")
    await anext(found)
    assert not told.closed
    await found.aclose()
    assert told.closed


async def test_nothing_is_generated_after_the_deadline() -> None:
    told = Told()
    told.say("a")
    deadline = asyncio.get_running_loop().time() + 0.05
    found = [one async for one in batches(told.chunks(), 0.0, deadline)]
    assert texts(found[0][0]) == ["a"]
    assert isinstance(found[-1][1], InferenceTimeout)
    assert told.closed


@pytest.mark.parametrize(
    "error",
    [ContextTooLong("task", "is too long"), Overloaded("Later.", retry_after_s=3.0)],
    ids=lambda one: type(one).__name__,
)
def test_errors_of_the_service_cross_as_themselves(error: ContextTooLong | Overloaded) -> None:
    found = pickle.loads(pickle.dumps(Batch([], as_value(error), 0.0))).error
    assert type(found) is type(error)
    assert vars(found) == vars(error)


def test_a_defect_crosses_as_text(caplog: pytest.LogCaptureFixture) -> None:
    class Local(Exception):
        """Does not pickle."""

    try:
        raise Local("here")
    except Local as error:
        found = pickle.loads(pickle.dumps(as_value(error)))
    assert type(found) is ReplicaError
    assert "Local: here" in str(found)
    assert "test_batches.py" in str(found)
    assert "the engine of a replica failed" in caplog.text


async def test_a_whole_answer_crosses_once() -> None:
    told = Told()
    async with aclosing(batches(told.chunks(), None)) as found:
        first = asyncio.ensure_future(anext(found))
        for text in "abc":
            told.say(text)
            await asyncio.sleep(0)
        assert not first.done()
        told.queue.put_nowait(LAST)
        chunks, error = await asyncio.wait_for(first, 60)
        assert (texts(chunks), error) == (["a", "b", "c", ""], None)
        assert Batch(chunks, error, 0.0).last


async def test_a_whole_answer_ends_at_its_deadline() -> None:
    told = Told()
    told.say("a")
    deadline = asyncio.get_running_loop().time() + 0.05
    ((chunks, error),) = [one async for one in batches(told.chunks(), None, deadline)]
    assert texts(chunks) == ["a"]
    assert isinstance(error, InferenceTimeout)


@pytest.mark.parametrize("delay_s", [None, 0.0])
async def test_a_message_has_a_bounded_number_of_chunks(
    monkeypatch: pytest.MonkeyPatch, delay_s: float | None
) -> None:
    monkeypatch.setattr(collecting, "MOST_CHUNKS", 3)
    wrong = ContextTooLong("task", "is too long")
    found = [one async for one in batches(at_once(*"abcdefg", error=wrong), delay_s)]
    assert [(texts(chunks), error) for chunks, error in found] == [
        (["a", "b", "c"], None),
        (["d", "e", "f"], None),
        (["g"], wrong),
    ]


async def test_a_slow_way_back_does_not_make_the_total_longer_than_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = on_ray(FakeEngine)
    now = asyncio.get_running_loop().time

    async def slow(packed: bytes, left_s: float | None, *, linked: bool) -> AsyncIterator[Batch]:
        """The replica is at work while the first message is on its way."""
        begun = now()
        await asyncio.sleep(0.1)
        yield Batch([Chunk("a")], None, age_s=0.0)
        yield Batch([replace(LAST, timings=Timings(0.0, 0.05, now() - begun))], None, age_s=0.1)

    monkeypatch.setattr(engine, "_batches", slow)
    begun = now()
    found = [one async for one in engine._chunks(GenerateRequest("test", "?"))]
    timings = found[-1].timings
    assert 0 <= timings.queue_s <= timings.first_token_s <= timings.total_s <= now() - begun


async def test_a_request_is_not_kept_while_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, counts = bytes(range(200)), list[int]()

    class Stream:
        async def answers(self) -> AsyncIterator[Batch]:
            counts.append(sys.getrefcount(packed))
            yield Batch([LAST], None, 0.0)

        def remote(self, request: bytes, left_s: float | None) -> AsyncIterator[Batch]:
            assert request is packed
            return self.answers()

        generate = property(lambda self: self)

    async def pack(request: GenerateRequest) -> bytes:
        return packed

    engine = on_ray(FakeEngine)
    monkeypatch.setattr(ray_engine, "_packed", pack)
    monkeypatch.setattr(ray_engine, "_errors_of_ray", nullcontext)  # which imports all of Ray
    monkeypatch.setattr(engine, "_streams", [Stream(), Stream()])
    before = sys.getrefcount(packed)
    assert len([one async for one in engine._chunks(GenerateRequest("test", "?"))]) == 1
    assert max(counts) <= before


def test_chunks_cross_unchanged() -> None:
    usage = Usage(prompt_tokens=9, image_tokens=4, output_tokens=2)
    chunks = [
        Chunk("é", None, usage),
        Chunk("", FinishReason.LENGTH, replace(usage, output_tokens=3), Timings(0.1, 0.2, 0.3)),
    ]
    batch = Batch(chunks, None, 0.5)
    assert pickle.loads(pickle.dumps(batch)) == batch


def status(code: StatusCode) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details="at 10.0.0.7:4711")


class Failing:
    """The handle of a deployment whose messages fail with a status. Counts the attempts."""

    generate = property(lambda self: self)

    def __init__(self, code: StatusCode) -> None:
        self.code, self.attempts = code, 0

    async def answers(self) -> AsyncIterator[Batch]:
        self.attempts += 1
        raise status(self.code)
        yield

    def remote(self, request: bytes, left_s: float | None) -> Failing.Answers:
        return Failing.Answers(self.answers())

    class Answers:
        def __init__(self, batches: AsyncIterator[Batch]) -> None:
            self._batches = batches

        def __anext__(self) -> object:
            return anext(self._batches)

        def cancel(self) -> None: ...


@pytest.mark.slow  # imports all of Ray
@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
@pytest.mark.parametrize(
    ("code", "kind", "reason", "attempts"),
    [
        (StatusCode.UNAVAILABLE, EngineUnavailable, "REPLICA_LOST", ray_engine.ATTEMPTS),
        (StatusCode.RESOURCE_EXHAUSTED, ReplicaError, None, 1),
        (StatusCode.INTERNAL, ReplicaError, None, 1),
        (StatusCode.DEADLINE_EXCEEDED, InferenceTimeout, "INFERENCE_TIMEOUT", 1),
        (StatusCode.CANCELLED, EngineUnavailable, "ENGINE_UNAVAILABLE", 1),
    ],
    ids=lambda one: one.name if isinstance(one, StatusCode) else "",
)
async def test_only_an_unavailable_replica_is_a_lost_one(
    code: StatusCode,
    kind: type[Exception],
    reason: str | None,
    attempts: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, failing = on_ray(FakeEngine), Failing(code)
    monkeypatch.setattr(ray_engine, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(engine, "_streams", [failing, failing])
    monkeypatch.setattr(engine, "_ready", lambda: None)
    monkeypatch.setattr(engine, "_check", lambda request: None)
    lost = metrics.replicas_lost.labels("error")._value.get()
    with caplog.at_level("INFO"), pytest.raises(kind) as raised:
        async for _ in engine.generate(GenerateRequest("test", "?")):
            pass
    assert failing.attempts == attempts
    assert code.name in caplog.text
    assert "10.0.0.7" not in str(raised.value)
    assert metrics.replicas_lost.labels("error")._value.get() - lost == (attempts > 1)
    if reason is not None:
        assert isinstance(raised.value, ServiceError)
        assert raised.value.reason == reason


class Unlinked:
    """The handle of a deployment whose replicas take no connections. Counts how often they are asked.

    error: raised in place of the answer.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.asked, self.error = 0, error

    def broadcast(self, method: str) -> Unlinked:
        return self

    async def results_async(self, **options: object) -> list[None]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return [None, None]


@pytest.mark.slow  # imports all of Ray
@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
async def test_replicas_that_take_no_connections_are_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of a cluster with TLS."""
    engine, handle = on_ray(FakeEngine, replicas=2), Unlinked()
    monkeypatch.setattr(engine, "_handle", handle)
    monkeypatch.setattr(engine, "_report", Report(running=2))
    await engine._link()
    assert engine._links is None, "Ray Serve carries all requests, and the next report is not early"
    await engine._link()
    assert handle.asked == 1


@pytest.mark.slow  # imports all of Ray
@pytest.mark.filterwarnings("ignore")  # Ray's own, at its import
@pytest.mark.parametrize("error", [TimeoutError("of one replica"), RuntimeError("a defect")])
async def test_a_server_goes_on_to_report(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever happens: replicas end when no server reports."""
    engine, handle, reports = on_ray(FakeEngine, replicas=2), Unlinked(error), 0
    enough = asyncio.Event()

    async def attend() -> None:
        nonlocal reports
        reports += 1
        if reports == 3:
            enough.set()

    monkeypatch.setattr(ray_engine, "UNLINKED_S", 0.001)
    monkeypatch.setattr(engine, "_handle", handle)
    monkeypatch.setattr(engine, "_attend", attend)
    monkeypatch.setattr(engine, "_report", Report(running=2))
    attending = asyncio.create_task(engine._attend_for_ever())
    waiting = asyncio.create_task(enough.wait())
    await asyncio.wait([attending, waiting], timeout=60, return_when=asyncio.FIRST_COMPLETED)
    attending.cancel()
    waiting.cancel()
    await asyncio.wait([attending, waiting])
    assert reports >= 3
    assert engine._links is not None


class Made(Replica):
    """Not made by Ray Serve, which would await the end."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("collects", [True, False])
async def test_text_is_kept_back_once(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine of a replica where it can, and else by the replica."""
    monkeypatch.setenv("RAY_USE_TLS", "1")  # no links: these ask Ray for the address of the machine
    told: list[float] = []
    engine = FakeEngine()
    if collects:
        engine.collect_text = told.append  # type: ignore[attr-defined]
    there = Made.__new__(Made)
    await there.__init__(lambda: engine, 0.5, 4, pytest.fail)  # type: ignore[misc]
    assert told == [0.5] * collects
    assert there._text_delay_s == there._listener.delay_s == (0.0 if collects else 0.5)
    await engine.close()


async def test_requests_wait_for_a_place_and_the_end_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    engine, told = FakeEngine(), Told()
    engine.generate = lambda request: told.chunks()  # type: ignore[method-assign]
    there = Made.__new__(Made)
    await there.__init__(lambda: engine, 0.0, 1, pytest.fail)  # type: ignore[misc]
    packed = pickle.dumps(GenerateRequest("test", "?"))
    first, second = there.generate(packed, None), there.generate(packed, None)
    told.say("a")
    assert texts((await anext(first)).chunks) == ["a"]
    waiting = asyncio.ensure_future(anext(second))
    await asyncio.sleep(0)
    assert await there.active() == 1
    told.queue.put_nowait(LAST)
    assert [batch.last async for batch in first] == [True]
    told.say("b")
    assert texts((await asyncio.wait_for(waiting, 60)).chunks) == ["b"]
    ending = asyncio.ensure_future(Replica.__del__(there))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not ending.done()
    told.queue.put_nowait(LAST)
    assert [batch.last async for batch in second] == [True]
    await asyncio.wait_for(ending, 60)
    assert await there.active() == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not tell who cancelled")
async def test_an_engine_that_cancels_its_own_answer_is_a_defect() -> None:
    """It held its place in the replica until the caller left: nothing was sent."""

    async def cancelled() -> AsyncIterator[Chunk]:
        yield Chunk("a")
        ended: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
        ended.cancel()
        yield await ended

    async def read() -> list[tuple[list[Chunk], Exception | None]]:
        return [one async for one in batches(cancelled(), NEVER)]

    found = await asyncio.wait_for(read(), 60)
    assert [text for chunks, _ in found for text in texts(chunks)] == ["a"]
    assert isinstance(found[-1][1], ReplicaError)


async def test_the_end_waits_for_a_request_that_gets_the_place_of_another_one() -> None:
    room, left, leave = Room(1), list[int](), [asyncio.Event(), asyncio.Event()]

    async def stay(number: int) -> None:
        async with room:
            await leave[number].wait()
            left.append(number)

    staying = [asyncio.create_task(stay(number)) for number in range(2)]
    await asyncio.sleep(0)
    emptied = asyncio.create_task(room.empty())
    await asyncio.sleep(0)
    leave[0].set()
    await staying[0]
    for _ in range(5):
        await asyncio.sleep(0)
    assert room.active == 1
    assert not emptied.done()
    leave[1].set()
    await asyncio.wait_for(emptied, 60)
    await staying[1]
    assert left == [0, 1]


async def test_a_request_does_not_reach_a_replica_after_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its images are copied in another thread, and the engine may end meanwhile: nothing would end the
    request then."""
    engine = on_ray(FakeEngine)

    async def pack(request: GenerateRequest) -> bytes:
        await engine.close()
        return b""

    monkeypatch.setattr(ray_engine, "_packed", pack)
    monkeypatch.setattr(ray_engine, "_errors_of_ray", nullcontext)  # which imports all of Ray
    monkeypatch.setattr(engine, "_streams", [])
    monkeypatch.setattr(engine, "_ready", lambda: None)
    monkeypatch.setattr(engine, "_check", lambda request: None)
    with pytest.raises(EngineUnavailable) as raised:
        await anext(engine.generate(GenerateRequest("test", "?")))
    assert raised.value.reason == "ENGINE_CLOSED"


async def test_a_request_that_a_full_replica_sends_back_waits_at_ray_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not on a link again, also where its replica is lost meanwhile."""
    engine, ways = on_ray(FakeEngine), list[bool]()
    failures = iter([NoRoom, LinkLost])

    async def answers(packed: bytes, left_s: float | None, *, linked: bool) -> AsyncIterator[Batch]:
        ways.append(linked)
        assert len(ways) < 4
        if (failure := next(failures, None)) is not None:
            raise failure
        yield Batch([Chunk("a"), LAST], None, 0.0)

    monkeypatch.setattr(ray_engine, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(engine, "_batches", answers)
    monkeypatch.setattr(engine, "_ready", lambda: None)
    monkeypatch.setattr(engine, "_check", lambda request: None)
    found = [chunk async for chunk in engine.generate(GenerateRequest("test", "?"))]
    assert texts(found) == ["a", ""]
    assert ways == [True, False, False]
    assert engine.active_requests == 0
