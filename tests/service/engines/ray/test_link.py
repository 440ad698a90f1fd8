"""The connection of a server to a replica, without Ray."""

from __future__ import annotations

import asyncio
import hmac
import os
import pickle
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace

import pytest

from service.engines.ray import link as link_module
from service.engines.ray.collecting import Room
from service.engines.ray.link import Link, LinkAddress, LinkLost, Links, Listener, NoRoom
from service.engines.ray.messages import Batch, ReplicaError
from service.errors import ContextTooLong, EngineUnavailable, InferenceTimeout
from service.types import Chunk, FinishReason, GenerateRequest, Usage

LAST = Chunk("", FinishReason.STOP, Usage(output_tokens=9))
LIMIT_S = 60.0
NEVER = 3600.0
Answer = Callable[[GenerateRequest], AsyncIterator[Chunk]]


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), LIMIT_S)


@dataclass
class Replica:
    """A listener, and what the requests on it do."""

    listener: Listener
    address: LinkAddress
    room: Room
    running: set[str]


@asynccontextmanager
async def replica(answer: Answer, *, delay_s: float = 0.0, room: int = 8) -> AsyncIterator[Replica]:
    running: set[str] = set()

    async def generate(request: GenerateRequest) -> AsyncIterator[Chunk]:
        running.add(request.request_id)
        try:
            async with aclosing(answer(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk
        finally:
            running.discard(request.request_id)

    places = Room(room)
    listener = Listener(generate, places, delay_s)
    address = await listener.start("127.0.0.1")
    try:
        yield Replica(listener, address, places, running)
    finally:
        listener.leave()
        for end in list(listener._ends):
            end.abort()


def packed(name: str = "one", *, piecewise: bool = True) -> bytes:
    return pickle.dumps(GenerateRequest(name, name, piecewise=piecewise))


async def two(request: GenerateRequest) -> AsyncIterator[Chunk]:
    yield Chunk(request.user)
    yield LAST


async def endless(request: GenerateRequest) -> AsyncIterator[Chunk]:
    yield Chunk(request.user)
    await asyncio.sleep(NEVER)


async def text(link: Link, name: str) -> str:
    return "".join([c.text async for b in link.run(packed(name), None) for c in b.chunks])


async def last(link: Link, request: bytes) -> Batch:
    """The last batch of an answer."""

    async def read() -> Batch:
        return [batch async for batch in link.run(request, None)][-1]

    return await asyncio.wait_for(read(), LIMIT_S)


async def test_answers_of_many_requests_do_not_mix() -> None:
    async with replica(two, room=100) as there:
        link = await Link.connect(there.address)
        names = [f"request {number}" for number in range(100)]
        assert await asyncio.gather(*(text(link, name) for name in names)) == names
        assert link.active == 0
        link.abort()


async def test_what_is_ready_at_the_same_time_travels_in_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    send = link_module._End.send

    def counted(self: link_module._End, values: list[object]) -> None:
        sizes.append(len(values))
        send(self, values)

    monkeypatch.setattr(link_module._End, "send", counted)
    async with replica(two) as there:
        link = await Link.connect(there.address)
        await asyncio.gather(*(text(link, str(number)) for number in range(8)))
        link.abort()
    assert sizes[0] == 8, "the requests"
    assert len(sizes) <= 4


@pytest.mark.parametrize("piecewise", [True, False])
async def test_text_is_collected(piecewise: bool) -> None:
    more = asyncio.Event()

    async def answer(request: GenerateRequest) -> AsyncIterator[Chunk]:
        for part in "abc":
            yield Chunk(part)
            await asyncio.sleep(0)
        await more.wait()
        yield LAST

    async with replica(answer, delay_s=NEVER) as there:
        link = await Link.connect(there.address)
        async with aclosing(link.run(packed(piecewise=piecewise), None)) as batches:
            found = []
            if piecewise:
                found.append((await anext(batches)).chunks)
            more.set()
            found += [batch.chunks async for batch in batches]
        link.abort()
    texts = ["".join(chunk.text for chunk in chunks) for chunks in found]
    assert "".join(texts) == "abc"
    assert found[-1][-1] == LAST
    assert len(texts) == (2 if piecewise else 1)


async def test_text_does_not_wait_longer_than_the_delay() -> None:
    async def answer(request: GenerateRequest) -> AsyncIterator[Chunk]:
        for part in "ab":
            yield Chunk(part)
            await asyncio.sleep(0.01)
        await asyncio.sleep(NEVER)

    async with replica(answer, delay_s=0.02) as there:
        link = await Link.connect(there.address)
        async with aclosing(link.run(packed(), None)) as batches:
            found = ""
            while found != "ab":
                batch = await asyncio.wait_for(anext(batches), LIMIT_S)
                found += "".join(chunk.text for chunk in batch.chunks)
        link.abort()


@pytest.mark.parametrize("error", [ContextTooLong("task", "is too long"), RuntimeError("a defect")])
async def test_errors_follow_the_text(error: Exception) -> None:
    async def answer(request: GenerateRequest) -> AsyncIterator[Chunk]:
        yield Chunk("a")
        raise error

    async with replica(answer) as there:
        link = await Link.connect(there.address)
        found = [batch async for batch in link.run(packed(), None)]
        link.abort()
    assert "".join(chunk.text for batch in found for chunk in batch.chunks) == "a"
    last = found[-1].error
    if isinstance(error, ContextTooLong):
        assert isinstance(last, ContextTooLong)
        assert vars(last) == vars(error)
    else:
        assert isinstance(last, ReplicaError)
        assert "a defect" in str(last)


async def test_closing_cancels_the_request_in_the_replica() -> None:
    async with replica(endless) as there:
        link = await Link.connect(there.address)
        batches = link.run(packed(), None)
        await anext(batches)
        assert there.running == {"one"}
        await batches.aclose()
        assert link.active == 0
        await until(lambda: not there.running and not there.room.active)
        link.abort()


async def test_a_deadline_ends_the_request_in_the_replica() -> None:
    async with replica(endless) as there:
        link = await Link.connect(there.address)
        found = [batch async for batch in link.run(packed(), 0.05)]
        assert isinstance(found[-1].error, InferenceTimeout)
        await until(lambda: not there.running)
        link.abort()


async def test_a_server_that_vanishes_frees_the_replica() -> None:
    async with replica(endless) as there:
        link = await Link.connect(there.address)
        batches = link.run(packed(), None)
        await anext(batches)
        link.abort()
        await until(lambda: not there.running)
        with pytest.raises(LinkLost):
            await anext(batches)


async def test_a_replica_that_vanishes_ends_its_requests() -> None:
    async with replica(endless) as there:
        link = await Link.connect(there.address)
        begun, waiting = link.run(packed("a"), None), link.run(packed("b"), None)
        await anext(begun)
        rest = [asyncio.ensure_future(anext(one)) for one in (begun, waiting)]
        await asyncio.sleep(0)
        for end in there.listener._ends:
            end.abort()
        for one in rest:
            with pytest.raises(LinkLost):
                await asyncio.wait_for(one, LIMIT_S)
        assert not link.open
        with pytest.raises(LinkLost):
            await text(link, "later")


async def test_a_full_replica_says_so() -> None:
    async with replica(endless, room=1) as there:
        link = await Link.connect(there.address)
        first = link.run(packed("a"), None)
        await anext(first)
        with pytest.raises(NoRoom):
            await text(link, "b")
        assert there.running == {"a"}
        await first.aclose()
        await until(lambda: not there.running)
        link.abort()


async def test_requests_of_one_message_are_counted_one_by_one() -> None:
    async with replica(endless, room=1) as there:
        link = await Link.connect(there.address)
        both = [link.run(packed(name), None) for name in "ab"]
        found = await asyncio.wait_for(
            asyncio.gather(*(anext(one) for one in both), return_exceptions=True), LIMIT_S
        )
        assert [type(one) for one in found] == [Batch, NoRoom]
        link.abort()


async def test_a_request_that_cannot_be_read_ends_with_an_error() -> None:
    async with replica(two) as there:
        link = await Link.connect(there.address)
        assert isinstance((await last(link, b"of another version")).error, ReplicaError)
        assert await text(link, "the next one") == "the next one"
        assert not there.room.active
        link.abort()


@pytest.mark.parametrize("parts", [(), ("a",)])
async def test_an_answer_without_an_end_is_a_defect(parts: tuple[str, ...]) -> None:
    async def answer(request: GenerateRequest) -> AsyncIterator[Chunk]:
        for part in parts:
            yield Chunk(part)

    async with replica(answer) as there:
        link = await Link.connect(there.address)
        assert isinstance((await last(link, packed())).error, ReplicaError)
        link.abort()


@asynccontextmanager
async def unread() -> AsyncIterator[LinkAddress]:
    """A replica that proves itself and reads nothing more."""
    secret, ended = b"secret", asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonce = await reader.readexactly(32)
        writer.write(bytes(32) + hmac.digest(secret, b"replica" + nonce, "sha256"))
        await ended.wait()
        writer.transport.abort()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    try:
        yield LinkAddress("127.0.0.1", server.sockets[0].getsockname()[1], secret)
    finally:
        ended.set()
        server.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such limit")
async def test_a_replica_that_reads_nothing_gets_no_more_and_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = link_module.LIVENESS
    monkeypatch.setitem(limits, "TCP_USER_TIMEOUT", limits["TCP_USER_TIMEOUT"] // 200)
    links = Links(1000)
    async with unread() as address:
        await links.update([address])
        first, waiting = links.choose(), []
        assert first is not None
        while (link := links.choose()) is not None:
            waiting.append(asyncio.ensure_future(anext(link.run(bytes(1 << 20), None))))
            await asyncio.sleep(0)
            assert len(waiting) < 100, "what waits to be sent has a limit"
        assert first.stuck
        for one in waiting:
            with pytest.raises(LinkLost):
                await asyncio.wait_for(one, LIMIT_S)
        assert links.count == 0


async def test_a_replica_that_reads_again_gets_requests_again() -> None:
    links = Links(1000)
    async with replica(two) as there:
        await links.update([there.address])
        link = links.choose()
        assert link is not None
        sent = asyncio.ensure_future(anext(link.run(bytes(32 << 20), None)))
        for _ in range(2):  # it begins, and is sent
            await asyncio.sleep(0)
        assert links.choose() is None
        await until(lambda: links.choose() is link)
        await sent
        link.abort()


async def test_a_replica_that_leaves_finishes_its_requests() -> None:
    more = asyncio.Event()

    async def answer(request: GenerateRequest) -> AsyncIterator[Chunk]:
        yield Chunk("a")
        await more.wait()
        yield LAST

    async with replica(answer) as there:
        links = Links(8)
        await links.update([there.address])
        link = links.choose()
        assert link is not None
        batches = link.run(packed(), None)
        await anext(batches)
        there.listener.leave()
        await until(lambda: links.count == 0)
        assert links.choose() is None
        with pytest.raises(NoRoom):
            await text(link, "sent before the server knew")
        more.set()
        assert [batch async for batch in batches][-1].chunks[-1] == LAST
        links.close(EngineUnavailable("closed"))


async def test_requests_are_spread_over_replicas() -> None:
    async with replica(endless) as first, replica(endless) as second:
        links = Links(3)
        await links.update([first.address, second.address])
        open_ = []
        for number in range(6):
            link = links.choose()
            assert link is not None
            open_.append(link.run(packed(str(number)), None))
            await anext(open_[-1])
            assert abs(len(first.running) - len(second.running)) <= 1
        assert (len(first.running), len(second.running)) == (3, 3)
        assert links.choose() is None, "a server has no more than its share on a replica"
        waiting = [asyncio.ensure_future(anext(one)) for one in open_]
        await asyncio.sleep(0)
        links.close(EngineUnavailable("closed"))
        for one in waiting:
            with pytest.raises(EngineUnavailable):
                await one


async def test_replicas_that_come_and_go() -> None:
    async with replica(two) as first:
        links = Links(8)
        async with replica(two) as second:
            await links.update([first.address, second.address])
            assert links.count == 2
            known = {links.choose(), links.choose()}
        await until(lambda: links.count == 1)
        await links.update([first.address])
        link = links.choose()
        assert link in known, "the connection stays"
        await links.update([])
        assert links.count == 0, "Ray Serve has taken the replica out"
        assert links.choose() is None
        await links.update([first.address])
        assert links.choose() is link, "the replica had only not answered in time"
        links.close(EngineUnavailable("closed"))


async def test_a_replica_out_of_reach_is_left_to_ray(caplog: pytest.LogCaptureFixture) -> None:
    async with replica(two) as there:
        pass
    links = Links(8)
    await links.update([there.address])
    assert links.choose() is None
    assert "cannot be reached directly" in caplog.text
    assert there.address.secret.hex() not in caplog.text


async def test_replicas_out_of_reach_are_tried_together_and_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A firewall that drops packets lets an attempt last: ten of them in turn would outlast the time
    after which a server that does not report counts as ended."""
    addresses = [LinkAddress("127.0.0.1", port, b"secret") for port in (1, 2, 3)]
    tried: list[LinkAddress] = []
    all_tried = asyncio.Event()

    async def connect(address: LinkAddress) -> Link:
        tried.append(address)
        if len(tried) == len(addresses):
            all_tried.set()
        await all_tried.wait()
        raise TimeoutError

    monkeypatch.setattr(Link, "connect", connect)
    links = Links(8)
    await asyncio.wait_for(links.update(addresses), LIMIT_S)
    assert (links.count, links.settled) == (0, 3)
    await links.update(addresses[:2])
    assert tried == addresses
    assert links.settled == 2, "the third one is gone"
    links._unreached[addresses[0]] = 0.0
    assert links.settled == 1
    await links.update(addresses[:2])
    assert tried == [*addresses, addresses[0]]
    assert caplog.text.count("cannot be reached directly") == 3, "once for each"


class Bomb:
    """Shows whether it was unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (99,)


async def test_neither_end_reads_a_pickle_of_a_stranger(caplog: pytest.LogCaptureFixture) -> None:
    bomb = pickle.dumps([Bomb()])
    bad = bytes(64) + len(bomb).to_bytes(8, "big") + bomb
    async with replica(two) as there:
        reader, writer = await asyncio.open_connection(there.address.host, there.address.port)
        writer.write(bad)
        # The nonce and a proof of the replica, and then the end.
        assert len(await asyncio.wait_for(reader.read(), LIMIT_S)) <= 64
        writer.close()
        with pytest.raises(ConnectionError, match="ended the connection"):
            await Link.connect(replace(there.address, secret=b"another"))

    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bad)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionError, match="ended the connection"):
            await Link.connect(LinkAddress("127.0.0.1", port, b"secret"))
    assert "did not prove itself" in caplog.text


async def test_a_proof_cannot_be_sent_back() -> None:
    """A stranger who returns what the replica says has proven nothing."""
    async with replica(two) as there:
        reader, writer = await asyncio.open_connection(there.address.host, there.address.port)
        nonce = await reader.readexactly(32)
        writer.write(nonce)
        writer.write(await reader.readexactly(32))
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        writer.close()


async def test_a_stranger_that_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HELLO_LIMIT_S", 0.02)
    async with replica(two) as there:
        reader, writer = await asyncio.open_connection(there.address.host, there.address.port)
        with suppress(ConnectionError):
            while await asyncio.wait_for(reader.read(100), LIMIT_S):
                pass
        writer.close()


def test_it_works_on_the_event_loop_of_replicas() -> None:
    uvloop = pytest.importorskip("uvloop")  # comes with Ray Serve

    async def ask() -> str:
        async with replica(two) as there:
            link = await Link.connect(there.address)
            answer = await text(link, "hello")
            link.abort()
            return answer

    loop = uvloop.new_event_loop()
    try:
        assert loop.run_until_complete(ask()) == "hello"
    finally:
        loop.close()
