"""A real HTTP server on a free port that answers byte for byte as a test says."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.ports import free_port

CHAT, NATIVE, MODELS = "/v1/chat/completions", "/api/chat", "/v1/models"
MODEL = "tiny-vl"


@dataclass
class Asked:
    """A request as it came, and how to answer it.

    gone: set when the client has closed the connection.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def raw(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def answer(
        self,
        value: Any,
        status: int = 200,
        content_type: str = "application/json",
        **headers: str,
    ) -> None:
        """A whole answer. value: bytes, or what becomes JSON."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        lines = {"content-type": content_type, "content-length": str(len(body)), **headers}
        await self.raw(head(status, lines) + body)

    async def begin_stream(self) -> None:
        lines = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
        await self.raw(head(200, lines))

    async def event(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self.piece(b"data: " + data + b"\n\n")

    async def piece(self, data: bytes) -> None:
        await self.raw(b"%x\r\n" % len(data) + data + b"\r\n")

    async def end_stream(self) -> None:
        await self.raw(b"0\r\n\r\n")

    def reset(self) -> None:
        """Break the connection without a goodbye."""
        self.writer.transport.abort()


def head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode()


def completion(
    text: str | None,
    *,
    finish_reason: str | None = "stop",
    model: str = MODEL,
    usage: Any = "some",
    **message: Any,
) -> dict[str, Any]:
    """A chat.completion."""
    told = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    one = {"role": "assistant", "content": text, **message}
    found: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": one, "finish_reason": finish_reason}],
    }
    if usage is not None:
        found["usage"] = told if usage == "some" else usage
    return found


def delta(
    text: str | None = None, finish_reason: str | None = None, model: str = MODEL, **more: Any
) -> dict[str, Any]:
    """A chat.completion.chunk."""
    one: dict[str, Any] = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": {**one, **more}, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": model, "choices": [choice]}


USAGE_CHUNK = {
    "object": "chat.completion.chunk",
    "model": MODEL,
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}

Script = Callable[[Asked], Awaitable[None]]


def saying(text: str, *, model: str = MODEL) -> Script:
    """Answers with a text, streamed where that is asked for."""

    async def script(asked: Asked) -> None:
        if asked.path == NATIVE:
            message = {"role": "assistant", "content": text}
            end = {"model": model, "message": message, "done": True, "done_reason": "stop"}
            line = json.dumps(end).encode() + b"\n"
            await asked.answer(line, content_type="application/x-ndjson")
            return
        if not asked.json["stream"]:
            await asked.answer(completion(text, model=model))
            return
        await asked.begin_stream()
        await asked.event(delta("", role="assistant", model=model))
        for begin in range(0, len(text), 5):
            await asked.event(delta(text[begin : begin + 5], model=model))
        await asked.event(delta(finish_reason="stop", model=model))
        await asked.event({**USAGE_CHUNK, "model": model})
        await asked.event(b"[DONE]")
        await asked.end_stream()

    return script


@dataclass
class Scripted:
    """The server: ``chat`` answers chat completions, ``others`` other paths.

    asked: every request for a chat completion. models: what it lists.
    """

    chat: Script
    models: Sequence[str] = (MODEL,)
    others: Mapping[str, Script] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.port = self.port or free_port()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)

    async def kill(self) -> None:
        """End at once, as a process that is killed: connections break, and nothing listens."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                await self._one(reader, writer)
        writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        asked = Asked(method, path, headers, body, writer, asyncio.Event())
        self.paths.append(path)
        watching = asyncio.create_task(_watch(reader, asked))
        try:
            await self._script(asked)(asked)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _script(self, asked: Asked) -> Script:
        if asked.path in self.others:
            return self.others[asked.path]
        if asked.path in (CHAT, NATIVE):
            self.asked.append(asked)
            return self.chat
        return self._list_models if asked.path in (MODELS, "/health") else _not_found

    async def _list_models(self, asked: Asked) -> None:
        data = [{"id": name, "object": "model"} for name in self.models]
        await asked.answer({"object": "list", "data": data})


async def _not_found(asked: Asked) -> None:
    await asked.answer({"error": {"message": "no such path"}}, 404)


async def _watch(reader: asyncio.StreamReader, asked: Asked) -> None:
    """Notice that the client closes the connection: it sends nothing before it has its answer."""
    while not reader.at_eof() and reader.exception() is None:  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0.005)
    asked.gone.set()


@asynccontextmanager
async def scripted(chat: Script, **options: Any) -> AsyncIterator[Scripted]:
    server = Scripted(chat, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.kill()
