"""HTTP inside our event loop: real sockets, real requests."""

from __future__ import annotations

import asyncio
import asyncio.selector_events
import http.client
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from service.web import MAX_TINY, TINY_BYTES, WebLimits, WebServer, server_tls
from tests.service.certificates import Authority
from tests.service.harness import until

pytestmark = pytest.mark.slow


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


@asynccontextmanager
async def serving(*routes: Route, **options: Any) -> AsyncIterator[WebServer]:
    options.setdefault("host", "127.0.0.1")
    server = WebServer(Starlette(routes=[Route("/hello", hello), *routes]), **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def get(port: int, path: str = "/hello", tls: ssl.SSLContext | None = None) -> tuple[int, bytes]:
    kind: Any = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    options = {} if tls is None else {"context": tls}
    connection = kind("localhost" if tls else "127.0.0.1", port, timeout=60, **options)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


async def read_to_end(port: int, sent: bytes) -> bytes:
    """What comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_answers_on_a_free_port_and_tells_which() -> None:
    async with serving() as server:
        assert server.port > 0
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")


async def test_a_name_with_several_addresses_gets_one_port() -> None:
    async with serving(host="localhost") as server:
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")


async def test_accepted_connections_do_not_delay_small_packets() -> None:
    found: list[int] = []

    async def look(request: Request) -> Response:
        for connection in server._server.server_state.connections:
            raw = connection.transport.get_extra_info("socket")
            found.append(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return PlainTextResponse("")

    async with serving(Route("/look", look)) as server:
        await asyncio.to_thread(get, server.port, "/look")
    assert len(found) == 1
    assert found[0] != 0


async def test_the_head_of_a_whole_answer_leaves_with_its_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[bytes] = []
    transport: Any = asyncio.selector_events._SelectorSocketTransport  # type: ignore[attr-defined]
    write = transport.write

    def noted(self: Any, data: bytes) -> None:
        written.append(bytes(data))
        write(self, data)

    monkeypatch.setattr(transport, "write", noted)
    async with serving() as server:
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")
    (head,) = [data for data in written if data.startswith(b"HTTP/1.1 200")]
    assert head.endswith(b"\r\n\r\nhello")


async def test_the_head_of_a_stream_does_not_wait_for_its_first_piece() -> None:
    go_on = asyncio.Event()

    async def pieces() -> AsyncIterator[bytes]:
        await go_on.wait()
        yield b"late"

    async def stream(request: Request) -> Response:
        return StreamingResponse(pieces())

    async with serving(Route("/stream", stream)) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert head.startswith(b"HTTP/1.1 200")
        go_on.set()
        assert b"late" in await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60)
        writer.close()


async def test_leaves_the_signals_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serving() as server:
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")
        now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert now == before


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with serving() as server:
        second = WebServer(Starlette(), host="127.0.0.1", port=server.port)
        with pytest.raises(OSError, match="in use"):
            await second.start()
        await second.stop()
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")


async def test_the_port_is_free_after_the_end() -> None:
    async with serving() as server:
        port = server.port
        await asyncio.to_thread(get, port)
    async with serving(port=port) as server:
        assert server.port == port


async def test_headers_that_are_too_long_are_refused() -> None:
    async with serving(limits=WebLimits(header_bytes=1024)) as server:
        sent = b"GET /hello HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 4096
        assert b"400" in (await read_to_end(server.port, sent)).split(b"\r\n")[0]


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


def chunked(count: int, size: int) -> bytes:
    """A request whose body comes in so many chunks of a size."""
    head = (
        b"POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )
    return head + (b"%x\r\n" % size + b"x" * size + b"\r\n") * count + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("count", "size", "status"),
    [(MAX_TINY, 1, 200), (MAX_TINY + 1, 1, 400), (2 * MAX_TINY, 2 * TINY_BYTES, 200)],
)
async def test_a_body_of_many_tiny_chunks_is_refused(count: int, size: int, status: int) -> None:
    """Each chunk costs as much as a large one, and those that came together are read in one go."""
    async with serving(Route("/echo", echo, methods=["POST"])) as server:
        answer = await read_to_end(server.port, chunked(count, size))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


async def test_the_offer_of_another_protocol_costs_neither_body_nor_connection() -> None:
    """The JDK's client offers h2c with its first request, also of a POST. httptools, uvicorn's other
    parser, loses the body of such a request."""
    offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAE\r\n"
    request = b"POST /echo HTTP/1.1\r\nhost: a\r\n%bcontent-length: %d\r\n\r\n%b"
    first, last = request % (offer, 5, b"x" * 5), request % (b"connection: close\r\n", 7, b"x" * 7)
    async with serving(Route("/echo", echo, methods=["POST"])) as server:
        answers = await read_to_end(server.port, first + last)
    bodies = [part.split(b"\r\n\r\n")[1] for part in answers.split(b"HTTP/1.1 200 OK")[1:]]
    assert bodies == [b"5", b"7"]


@pytest.mark.parametrize("sent", [b"", b"GET /hello HTTP/1.1\r\nhost: a\r\n"], ids=["none", "some"])
async def test_headers_that_do_not_come_end_the_connection(sent: bytes) -> None:
    async with serving(limits=WebLimits(header_s=0.1)) as server:
        assert await read_to_end(server.port, sent) == b""
        await until(lambda: server.connections == 0)


@pytest.mark.slow  # the limit is so long that a busy machine sends its headers in time
async def test_an_answer_may_take_longer_than_its_headers() -> None:
    async def slow(request: Request) -> Response:
        await asyncio.sleep(2.5)
        return PlainTextResponse("late")

    async with serving(Route("/slow", slow), limits=WebLimits(header_s=2)) as server:
        assert await asyncio.to_thread(get, server.port, "/slow") == (200, b"late")


async def test_an_idle_connection_is_closed() -> None:
    async with serving(limits=WebLimits(keep_alive_s=1)) as server:
        answer = await read_to_end(server.port, b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n")
    assert answer.endswith(b"hello")


async def test_connections_beyond_the_limit_are_closed() -> None:
    async with serving(limits=WebLimits(connections=1)) as server:
        _, first = await asyncio.open_connection("127.0.0.1", server.port)
        await until(lambda: server.connections == 1)
        assert await read_to_end(server.port, b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n") == b""
        first.close()
        await until(lambda: server.connections == 0)
        assert await asyncio.to_thread(get, server.port) == (200, b"hello")


async def test_a_request_in_flight_gets_the_grace() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Response:
        begun.set()
        await go_on.wait()
        return PlainTextResponse("done")

    async with serving(Route("/slow", slow)) as server:
        asked = asyncio.create_task(asyncio.to_thread(get, server.port, "/slow"))
        await begun.wait()
        stopping = asyncio.create_task(server.stop(20))
        go_on.set()
        assert await asked == (200, b"done")
        await stopping


async def test_a_request_that_does_not_end_is_cut() -> None:
    begun = asyncio.Event()

    async def hang(request: Request) -> Response:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("never here")

    async with serving(Route("/hang", hang)) as server:
        asked = asyncio.create_task(
            read_to_end(server.port, b"GET /hang HTTP/1.1\r\nhost: a\r\n\r\n")
        )
        await begun.wait()
        await asyncio.wait_for(server.stop(0.1), 60)
        assert b"200" not in (await asked)
        assert server.connections == 0


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "web.sock"
    async with serving(host=f"unix:{path}"):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"GET /hello HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 60)).endswith(b"hello")
        writer.close()
        second = WebServer(Starlette(), host=f"unix:{path}")
        with pytest.raises(OSError, match="another process listens"):
            await second.start()
        await second.stop()
        assert path.exists()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as left:  # the file of a server that was killed
        left.bind(str(path))
    async with serving(host=f"unix:{path}"):
        assert path.is_socket()


async def test_tls_and_files_that_are_renewed(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, second = Authority.create(tmp_path / "first"), Authority.create(tmp_path / "second")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(authority: Authority) -> None:
        issued_cert, issued_key = authority.issue("server")
        cert.write_bytes(issued_cert.read_bytes())
        key.write_bytes(issued_key.read_bytes())

    install(first)
    async with serving(tls=server_tls(cert, key)) as server:

        def fetch(authority: Authority) -> tuple[int, bytes]:
            return get(server.port, tls=ssl.create_default_context(cafile=str(authority.cert)))

        assert await asyncio.to_thread(fetch, first) == (200, b"hello")
        install(second)
        assert await asyncio.to_thread(fetch, second) == (200, b"hello")
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(fetch, first)
        key.write_text("broken")  # in the middle of a renewal
        assert await asyncio.to_thread(fetch, second) == (200, b"hello")


@asynccontextmanager
async def serving_tls(folder: Path, **options: Any) -> AsyncIterator[tuple[WebServer, Any]]:
    """A server with TLS, and the context of a client that trusts it."""
    authority = Authority.create(folder)
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    async with serving(tls=server_tls(*authority.issue("server")), **options) as server:
        yield server, trusting


async def test_tls_handshakes_are_in_the_limit_of_connections(tmp_path: Path) -> None:
    async with serving_tls(tmp_path, limits=WebLimits(connections=2)) as (server, trusting):
        silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        await until(lambda: server.connections == 2)
        assert await asyncio.wait_for(read_to_end(server.port, b""), 60) == b""
        assert server.connections == 2
        silent[0][1].close()
        await until(lambda: server.connections == 1)
        assert await asyncio.to_thread(get, server.port, tls=trusting) == (200, b"hello")
        silent[1][1].close()
        await until(lambda: server.connections == 0)


async def test_connections_are_in_the_limit_of_tls_handshakes(tmp_path: Path) -> None:
    async with serving_tls(tmp_path, limits=WebLimits(connections=1)) as (server, trusting):
        _, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=trusting, server_hostname="localhost"
        )
        assert server.connections == 1
        assert await asyncio.wait_for(read_to_end(server.port, b""), 60) == b""
        writer.transport.abort()
        await until(lambda: server.connections == 0)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x16\x03\x01\x02\x00\x01", b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n"],
    ids=["nothing", "a part", "no TLS"],
)
async def test_a_tls_handshake_that_does_not_end_is_ended(tmp_path: Path, sent: bytes) -> None:
    async with serving_tls(tmp_path, limits=WebLimits(header_s=0.1)) as (server, _):
        assert b"hello" not in await asyncio.wait_for(read_to_end(server.port, sent), 60)
        await until(lambda: server.connections == 0)


async def test_the_end_does_not_wait_for_tls_handshakes(tmp_path: Path) -> None:
    async with serving_tls(tmp_path) as (server, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await until(lambda: server.connections == 1)
        await asyncio.wait_for(server.stop(200), 60)
        assert server.connections == 0
        with suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()


async def test_a_request_that_comes_with_the_end_of_the_handshake(tmp_path: Path) -> None:
    """A client of TLS 1.3 sends its first request with its last message of the handshake."""
    async with serving_tls(tmp_path) as (server, trusting):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await asyncio.wait_for(reader.read(65536), 60))
        assert client.version() == "TLSv1.3"
        client.write(b"GET /hello HTTP/1.1\r\nhost: a\r\n\r\n")
        writer.write(outgoing.read())
        answer = b""
        while not answer.endswith(b"hello"):
            incoming.write(await asyncio.wait_for(reader.read(65536), 60))
            with suppress(ssl.SSLWantReadError):
                while True:
                    answer += client.read(65536)
        writer.transport.abort()
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_files_of_tls_that_cannot_be_used_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        server_tls(tmp_path / "none.pem", tmp_path / "none.pem")


async def test_a_peer_who_reads_nothing_is_dropped() -> None:
    async def large(request: Request) -> Response:
        return Response(b"x" * 20_000_000)

    limits = WebLimits(write_s=0.5)
    async with serving(Route("/large", large), limits=limits) as server:
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            unread.connect(("127.0.0.1", server.port))
            unread.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
            await until(lambda: server.connections == 1, 60)
            await until(lambda: server.connections == 0, 60)
