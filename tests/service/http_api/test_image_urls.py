"""Images by URL through the real server: what is fetched, and every way to misuse it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.engines.fake import FakeEngine
from service.http_api import fetching
from service.http_api.image_urls import UrlRefused, allowed_url, is_public
from service.http_api.server import HttpFrontEnd
from service.image_hosts import ImageHost, parse_hosts
from service.runtime import Runtime
from service.settings import Settings, SettingsError
from service.wiring import build_registry
from tests.service.certificates import Authority
from tests.service.harness import image_bytes, until
from tests.service.http_api.harness import CHAT, Reply, Serving, request, serving
from tests.service.http_api.test_chat import Recorder

pytestmark = pytest.mark.slow

PICTURE = image_bytes(64, 48)
OK = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"


def whole(data: bytes = PICTURE, head: bytes = OK) -> bytes:
    """A response with a body of a known length."""
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


def redirect(target: str, *, cookie: bool = False) -> bytes:
    more = "set-cookie: a=b; path=/\r\n" if cookie else ""
    head = f"HTTP/1.1 302 Found\r\nlocation: {target}\r\n{more}content-length: 0\r\n\r\n"
    return head.encode()


Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Host:
    """A host of images on 127.0.0.1 that speaks TLS; answers by path."""

    answers: dict[str, Answer] = field(default_factory=lambda: {"/a.png": whole()})
    requests: list[bytes] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    connections: int = 0
    ended: int = 0
    port: int = 0

    @property
    def entry(self) -> str:
        """In image_hosts: its name, its port, and its address without a lookup."""
        return f"localhost:{self.port}=127.0.0.1"

    def url(self, path: str = "/a.png") -> str:
        return f"https://localhost:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head)
                answer = self.answers[head.split()[1].decode()]
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await answer(writer)
                    return
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass  # the server has closed the connection
        finally:
            self.ended += 1
            writer.close()


@asynccontextmanager
async def hosting(folder: Path, name: str = "server") -> AsyncIterator[tuple[Host, Path]]:
    """A host, and the certificate of its authority."""
    folder.mkdir(exist_ok=True)
    authority = Authority.create(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name))
    host = Host()
    context.sni_callback = lambda _connection, sent, _context: host.names.append(sent)
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=context)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host, authority.cert
    finally:
        server.close()


@asynccontextmanager
async def fetching_server(
    folder: Path, engine: FakeEngine | None = None, **settings: Any
) -> AsyncIterator[tuple[Serving, Host]]:
    """A server that may fetch from a host."""
    async with hosting(folder) as (host, authority):
        chosen = {"image_hosts": host.entry, "image_hosts_ca": authority, **settings}
        async with serving(engine or FakeEngine("ok"), **chosen) as server:
            yield server, host


def shown(*urls: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


async def ask(server: Serving, *urls: str) -> Reply:
    return await server.chat(messages=shown(*urls))


def refusal(reply: Reply) -> tuple[int, str]:
    assert reply.error["param"] == "messages[0].content[0].image_url.url"
    return reply.status, reply.error["code"]


REFUSED = (400, "IMAGE_URL_REFUSED")
FAILED = (400, "IMAGE_FETCH_FAILED")


# What works


async def test_an_image_of_a_listed_host_is_fetched(tmp_path: Path) -> None:
    engine = Recorder("ok")
    async with fetching_server(tmp_path, engine) as (server, host):
        signed = "/b%20c.png?x=A%2Fb%2B&y=%41"
        host.answers[signed] = whole(image_bytes(32, 32))
        records: list[Any] = []
        server.runtime.observation.listeners.append(records.append)
        spelt = f"HTTPS://LOCALHOST:{host.port}{signed}#part"
        reply = await ask(server, host.url(), spelt)
    assert reply.status == 200, reply.body
    images = engine.requests[-1].all_images
    assert [(one.width, one.height) for one in images] == [(64, 48), (32, 32)]
    assert host.names[0] == "localhost"
    head = next(one for one in host.requests if b"/a.png" in one).lower()
    assert f"host: localhost:{host.port}".encode() in head
    assert b"accept-encoding: identity" in head
    for name in (b"cookie", b"authorization", b"referer", b"traceparent", b"x-request-id"):
        assert name not in head
    assert (records[-1].images, records[-1].image_bytes > len(PICTURE)) == (2, True)


async def test_streams_and_responses_fetch_too(tmp_path: Path) -> None:
    async with fetching_server(tmp_path) as (server, host):
        stream = await server.chat(messages=shown(host.url()), stream=True)
        part = {"type": "input_image", "image_url": host.url(), "detail": "auto"}
        document = {"model": "fake", "input": [{"role": "user", "content": [part]}]}
        body = json.dumps(document).encode()
        responses = await server.request("POST", "/v1/responses", body)
        body = body.replace(b"localhost", b"example.org")
        refused = await server.request("POST", "/v1/responses", body)
    assert stream.body.endswith(b"data: [DONE]\n\n")
    assert responses.status == 200, responses.body
    assert refused.error["param"] == "input[0].content[0].image_url"
    assert len(host.requests) == 2


async def test_a_redirect_within_the_list_is_followed_without_cookies(tmp_path: Path) -> None:
    async with fetching_server(tmp_path) as (server, host):
        host.answers["/old"] = redirect("/older", cookie=True)
        host.answers["/older"] = redirect(host.url(), cookie=True)
        reply = await ask(server, host.url("/old"))
    assert reply.status == 200, reply.body
    assert len(host.requests) == 3
    assert b"cookie" not in b"".join(host.requests).lower()


async def test_proxies_of_the_environment_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine localhost login user password secret\n")
    async with fetching_server(tmp_path) as (server, host):
        reply = await ask(server, host.url())
    assert reply.status == 200, reply.body
    assert b"authorization" not in host.requests[0].lower()


async def test_a_caller_who_leaves_ends_the_fetch(tmp_path: Path) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"content-length: 100\r\n\r\nabc")
        await silent(writer)

    async with fetching_server(tmp_path) as (server, host):
        host.answers["/slow"] = hang
        asking = asyncio.create_task(ask(server, host.url("/slow")))
        await until(lambda: len(host.requests) == 1, 60)
        asking.cancel()
        await until(lambda: host.ended == 1, 60)
        await until(lambda: server.runtime.lifecycle.calls_in_flight == 0, 60)
        assert (await ask(server, host.url())).status == 200


# URLs

LIST = (ImageHost("localhost", 8443), ImageHost("images.example.org"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://images.example.org/a", "only https"),
        ("ftp://images.example.org/a", "only https"),
        ("https://other.example.org/a", "no images from"),
        ("https://images.example.org.evil.example/a", "no images from"),
        ("https://evil.example/images.example.org", "no images from"),
        ("https://evil.example#@images.example.org/", "no images from"),
        ("https://evil.example?@images.example.org/", "no images from"),
        ("https://images.example.org./a", "no images from"),
        ("https://images.example.org%2eevil.example/a", ""),
        ("https://images.example.org:8443/a", "no images from"),
        ("https://localhost/a", "no images from"),
        ("https://localhost:99999/a", ""),
        ("https://localhost:08443x/a", ""),
        ("https://user@images.example.org/a", "no user"),
        ("https://user:secret@images.example.org/a", "no user"),
        ("https://:@images.example.org/a", "no user"),
        ("https://images.example.org@evil.example/a", "no user"),
        ("https://evil.example\\@images.example.org/a", "characters"),
        ("https://images.example.org\\.evil.example/a", "characters"),
        ("https://images.example.org/a b", "characters"),
        ("https://images.example.org/\r\nhost: evil", "characters"),
        ("https://images.example.org/\u00e9", "characters"),
        ("https://\uff49mages.example.org/", "characters"),
        ("https://127.0.0.1:8443/a", "no images from"),
        ("https://2130706433:8443/a", "no images from"),
        ("https://0x7f000001:8443/a", "no images from"),
        ("https://0177.0.0.1:8443/a", "no images from"),
        ("https://127.1:8443/a", "no images from"),
        ("https://[::1]:8443/a", "no images from"),
        ("https://[::ffff:127.0.0.1]:8443/a", "no images from"),
        ("https:///a", ""),
        ("https:images.example.org", ""),
        ("https://images.example.org/" + "a" * 9000, "longer than"),
    ],
)
def test_urls_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(UrlRefused) as raised:
        allowed_url(url, LIST)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("url", "requested"),
    [
        ("https://images.example.org/a?b=c%2Fd#e", "https://images.example.org/a?b=c%2Fd"),
        ("HTTPS://IMAGES.example.org:443/a", "https://IMAGES.example.org/a"),
        ("https://localhost:8443/../a", "https://localhost:8443/../a"),
    ],
)
def test_urls_that_are_requested(url: str, requested: str) -> None:
    assert str(allowed_url(url, LIST)) == requested


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
        *("198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1"),
        *(
            "64:ff9b::7f00:1",
            "64:ff9b::808:808",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
        ),
        *("2002:7f00:1::", "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0"),
        *("fec0::1", "ff02::1", "4000::1", "localhost", ""),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "172.32.0.1", "2606:2800:21f:cb07::1", "2a00:1450::5"]
)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


# Names and addresses


def not_looked_up(host: str) -> list[str]:
    raise AssertionError("a name was looked up")


async def test_nothing_is_looked_up_for_what_is_not_on_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "addresses_of", not_looked_up)
    async with fetching_server(tmp_path) as (server, host):
        for url in (
            "https://169.254.169.254/latest/meta-data/",
            "https://example.org/a.png",
            f"http://localhost:{host.port}/a.png",
            f"https://user:secret@localhost:{host.port}/a.png",
            "https://localhost/a.png",
            f"https://127.0.0.1:{host.port}/a.png",
        ):
            assert refusal(await ask(server, url)) == REFUSED, url
        mixed = await ask(server, host.url(), "https://example.org/a.png")
        file = await ask(server, "file:///etc/passwd")
    assert mixed.error["param"] == "messages[0].content[1].image_url.url"
    assert refusal(file) == REFUSED
    assert host.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["10.0.0.5"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["93.184.215.14", "127.0.0.1"],
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_not_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    monkeypatch.setattr(fetching, "addresses_of", lambda host: addresses)
    async with hosting(tmp_path) as (host, authority):
        settings = {"image_hosts": f"localhost:{host.port}", "image_hosts_ca": authority}
        async with serving(FakeEngine("ok"), **settings) as server:
            connecting: list[Any] = []
            connect = asyncio.BaseEventLoop.sock_connect

            async def watched(self: Any, *arguments: Any) -> Any:
                connecting.append(arguments)
                return await connect(self, *arguments)

            connection = await server.connect()
            monkeypatch.setattr(asyncio.BaseEventLoop, "sock_connect", watched)
            monkeypatch.setattr(
                "asyncio.selector_events.BaseSelectorEventLoop.sock_connect", watched
            )
            import json

            body = json.dumps(request(messages=shown(host.url()))).encode()
            await connection.send("POST", CHAT, body)
            reply = await connection.reply()
            monkeypatch.undo()
            connection.close()
    assert refusal(reply) == REFUSED
    assert "not public" in reply.error["message"]
    assert not any(one in reply.body.decode() for one in addresses)
    assert (connecting, host.connections) == ([], 0)


async def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS that answers with a good address first and then with another one."""
    asked: list[str] = []

    def rebinding(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    monkeypatch.setattr(fetching, "addresses_of", rebinding)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    async with hosting(tmp_path) as (host, authority):
        settings = {"image_hosts": f"localhost:{host.port}", "image_hosts_ca": authority}
        async with serving(FakeEngine("ok"), **settings) as server:
            monkeypatch.setattr(socket, "getaddrinfo", not_looked_up)
            first = await ask(server, host.url())
            second = await ask(server, host.url())
    assert first.status == 200, first.body
    assert refusal(second) == REFUSED
    assert asked == ["localhost", "localhost"]
    assert host.connections == 1


async def test_a_name_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str) -> list[str]:
        raise socket.gaierror(-2, "secret of the resolver")

    monkeypatch.setattr(fetching, "addresses_of", unknown)
    async with serving(FakeEngine("ok"), image_hosts="images.example") as server:
        reply = await ask(server, "https://images.example/a.png")
    assert refusal(reply) == FAILED
    assert "not known" in reply.error["message"]
    assert b"secret" not in reply.body


# Hosts that misbehave


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254/latest/meta-data/",
        "http://localhost:{port}/a.png",
        "https://other.example/a.png",
        "//other.example/a.png",
        "https://user:secret@localhost:{port}/a.png",
        "file:///etc/passwd",
        "https://localhost/a.png",
    ],
)
async def test_a_redirect_is_checked_like_the_first_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(fetching, "addresses_of", not_looked_up)
    async with fetching_server(tmp_path) as (server, host):
        host.answers["/old"] = redirect(target.format(port=host.port))
        reply = await ask(server, host.url("/old"))
    assert refusal(reply) == REFUSED
    assert "redirects" in reply.error["message"]
    assert len(host.requests) == 1


async def test_redirects_without_end(tmp_path: Path) -> None:
    async with fetching_server(tmp_path) as (server, host):
        host.answers["/loop"] = redirect("/loop")
        reply = await ask(server, host.url("/loop"))
    assert refusal(reply) == FAILED
    assert len(host.requests) == 4


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"transfer-encoding: chunked\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


async def slow(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"content-length: 100000\r\n\r\n")
    while not writer.transport.is_closing():
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def silent(writer: asyncio.StreamWriter) -> None:
    await until(writer.transport.is_closing, 60)


async def endless_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(OK)
    while not writer.transport.is_closing():
        writer.write(b"x-more: " + b"a" * 1000 + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0)


async def cut(writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"content-length: 100000\r\n\r\n" + PICTURE)
    await writer.drain()


MISBEHAVING: dict[str, tuple[Answer, str, str]] = {
    "endless body": (endless, "IMAGE_TOO_LARGE", "bytes"),
    "announced too large": (OK + b"content-length: 99999999\r\n\r\n", "IMAGE_TOO_LARGE", "bytes"),
    "slow body": (slow, "IMAGE_FETCH_FAILED", "within"),
    "silence": (silent, "IMAGE_FETCH_FAILED", "within"),
    "endless headers": (endless_headers, "IMAGE_FETCH_FAILED", "could not be fetched"),
    "cut body": (cut, "IMAGE_FETCH_FAILED", "did not answer"),
    "gzip": (whole(b"\x1f\x8b" + b"x" * 50, OK + b"content-encoding: gzip\r\n"), "IMAGE_FETCH_FAILED", "compressed"),
    "status": (whole(b"secret", b"HTTP/1.1 404 No\r\n"), "IMAGE_FETCH_FAILED", "status 404"),
    "not HTTP": (b"hello there\r\n\r\n", "IMAGE_FETCH_FAILED", "did not answer"),
    "no image": (whole(b"<html>"), "IMAGE_FORMAT_UNSUPPORTED", ""),
    "no bytes": (whole(b""), "IMAGE_EMPTY", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISBEHAVING)
async def test_a_host_that_misbehaves(tmp_path: Path, kind: str) -> None:
    answer, code, says = MISBEHAVING[kind]
    limits = {"max_image_bytes": 300_000}
    if says == "within":
        limits["image_fetch_timeout_s"] = 1  # what is slow takes longer on the slowest machine
    async with fetching_server(tmp_path, **limits) as (server, host):
        host.answers["/b.png"] = answer
        reply = await ask(server, host.url("/b.png"))
        await until(lambda: host.ended == host.connections, 60)
        healthy = await ask(server, host.url())
    assert refusal(reply) == (400, code)
    assert says in reply.error["message"]
    assert b"secret" not in reply.body
    assert healthy.status == 200 or says == "within", "a second may be too short for a slow machine"


async def test_a_certificate_of_another_authority(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with fetching_server(tmp_path / "one", image_hosts_ca=Authority.create(other).cert) as (
        server,
        host,
    ):
        reply = await ask(server, host.url())
    assert refusal(reply) == FAILED
    assert "certificate" in reply.error["message"]
    assert host.requests == []


async def test_a_certificate_of_another_name(tmp_path: Path) -> None:
    async with hosting(tmp_path) as (host, authority):
        entry = f"images.example:{host.port}=127.0.0.1"
        async with serving(image_hosts=entry, image_hosts_ca=authority) as server:
            reply = await ask(server, f"https://images.example:{host.port}/a.png")
    assert refusal(reply) == FAILED
    assert "certificate" in reply.error["message"]
    assert host.requests == []


async def test_a_host_without_tls_and_one_that_is_down() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with serving(image_hosts=f"localhost:{port}=127.0.0.1") as server:
        without = await ask(server, f"https://localhost:{port}/a.png")
        listener.close()
        await listener.wait_closed()
        down = await ask(server, f"https://localhost:{port}/a.png")
    assert refusal(without) == FAILED
    assert refusal(down) == FAILED
    assert "127.0.0.1" not in down.body.decode()


async def test_the_images_of_a_request_have_a_limit_together(tmp_path: Path) -> None:
    mib = 1024 * 1024
    async with fetching_server(tmp_path, max_image_bytes=mib, max_message_bytes=2 * mib + 4096) as (
        server,
        host,
    ):
        host.answers["/b.png"] = whole(b"x" * (mib - 1))
        urls = [host.url("/b.png")] * 4
        reply = await ask(server, *urls)
    assert (reply.status, reply.error["code"]) == (413, "REQUEST_TOO_LARGE")
    assert reply.error["param"] == "messages"


# Settings


def test_entries_of_the_list() -> None:
    found = parse_hosts("Images.example.org, cdn.example:8443 ,a.example=10.0.0.5,b:1=::1,")
    assert found == (
        ImageHost("images.example.org"),
        ImageHost("cdn.example", 8443),
        ImageHost("a.example", 443, "10.0.0.5"),
        ImageHost("b", 1, "::1"),
    )


@pytest.mark.parametrize(
    "text",
    ["*", "*.example.org", "https://example.org", "127.0.0.1", "2130706433", "[::1]", "a.0x7f", "a:0",
     "a:https", "a=localhost", "a/b", "a@b", "-a.example", "a..b", "x" * 64],
)  # fmt: skip
def test_entries_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="image_hosts"):
        Settings(image_hosts=text)


async def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    settings = Settings(
        port=0, http_port=0, image_hosts="example.org", image_hosts_ca=tmp_path / "ca.pem"
    )
    runtime = Runtime(settings, [FakeEngine()], build_registry(settings))
    with pytest.raises(SettingsError, match="image_hosts_ca"):
        await runtime.start([HttpFrontEnd(runtime)])
    await runtime.stop(0)
