"""A server with gRPC and HTTP on the fake engine, and a raw HTTP client: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from service.cli.front_ends import further_routes
from service.engine import Engine
from service.engines.fake import FakeEngine
from service.grpc_api.server import GrpcFrontEnd
from service.http_api.server import HttpFrontEnd
from service.runtime import Runtime
from service.settings import Settings
from service.structured_output.pool import GrammarPool
from service.wiring import build_registry

CHAT = "/v1/chat/completions"
LIMIT_S = 60.0
"""How long a test waits for what has to happen."""


@dataclass(frozen=True)
class Reply:
    """An HTTP response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])


@dataclass
class Serving:
    """A server that serves over both front ends."""

    runtime: Runtime
    engine: Any
    grpc: GrpcFrontEnd
    http: HttpFrontEnd
    ssl: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def base_url(self) -> str:
        return f"{self.http.place}/v1"

    async def connect(self) -> Connection:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.http.port, ssl=self.ssl, limit=2**24
        )
        return Connection(reader, writer)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request over a connection of its own."""
        connection = await self.connect()
        try:
            await connection.send(method, path, body, {**self.headers, **(headers or {})})
            return await connection.reply(empty=method == "HEAD")
        finally:
            connection.close()

    async def chat(self, headers: Mapping[str, str] | None = None, **fields: Any) -> Reply:
        """POST /v1/chat/completions with fields over sensible ones; None leaves a field out."""
        return await self.post(request(**fields), headers)

    async def post(self, document: Any, headers: Mapping[str, str] | None = None) -> Reply:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return await self.request("POST", CHAT, body, headers)


class Connection:
    """One connection of HTTP/1.1, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        lines = {"host": "test"}
        if body is not None:
            lines |= {"content-type": "application/json", "content-length": str(len(body))}
        lines |= headers or {}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await self.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), LIMIT_S)).decode()
        first, *rest = lines.strip().split("\r\n")
        pairs = (line.partition(": ") for line in rest)
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    async def reply(self, *, empty: bool = False) -> Reply:
        """The next response. empty: one without a body, whatever its headers say."""
        status, headers = await self.head()
        if empty:
            return Reply(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Reply(status, headers, b"".join([piece async for piece in self.pieces()]))
        size = int(headers.get("content-length", 0))
        return Reply(
            status, headers, await asyncio.wait_for(self.reader.readexactly(size), LIMIT_S)
        )

    async def pieces(self) -> AsyncIterator[bytes]:
        """The chunks of a chunked body."""
        while True:
            size = int(await asyncio.wait_for(self.reader.readline(), LIMIT_S), 16)
            piece = await asyncio.wait_for(self.reader.readexactly(size + 2), LIMIT_S)
            if size == 0:
                return
            yield piece[:-2]

    def close(self) -> None:
        self.writer.close()


def request(**fields: Any) -> dict[str, Any]:
    """A chat request with fields over sensible ones; None leaves a field out."""
    document = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], **fields}
    return {name: value for name, value in document.items() if value is not None}


def shown(*parts: Any) -> list[dict[str, Any]]:
    """Messages with one of the user: texts, and images as the bytes of files."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else image_part(part)
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data), **more}}


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def events(body: bytes) -> list[Any]:
    """The data of server-sent events; ``[DONE]`` stays text."""
    found = []
    for block in body.decode().split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


def streamed(found: list[Any]) -> str:
    """The text of the chunks of a stream."""
    choices = [choice for chunk in found if chunk != "[DONE]" for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


LONG = ("word" + " " * 2000) * 200
"""An answer that fills the buffers of a caller who does not read, in few pieces: each takes a turn of the
event loop, for which a thread that computes may let it wait for milliseconds."""


def small_buffers(server: Serving) -> socket.socket:
    """A socket for a caller who does not read: little of an answer fills its buffer and the one of
    the server. Not connected yet."""
    web = server.http._server
    assert web is not None
    web._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections, too
    unread = socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return unread


@asynccontextmanager
async def serving(
    engine: Engine | None = None,
    *,
    load: bool = True,
    pool: GrammarPool | None = None,
    **settings: Any,
) -> AsyncIterator[Serving]:
    """Start gRPC and HTTP on one runtime; stop them without grace at the end."""
    chosen = Settings(port=0, http_port=0, **settings)
    engine = engine or FakeEngine()
    runtime = Runtime(chosen, [engine], build_registry(chosen), pool=pool)
    grpc, http = GrpcFrontEnd(runtime), HttpFrontEnd(runtime, further_routes(runtime))
    await runtime.start([grpc, http])
    try:
        if load:
            await runtime.load()
        yield Serving(runtime, engine, grpc, http)
    finally:
        await runtime.stop(0)
