"""Calls of the soak to the HTTP port: OpenAI's APIs, Connect, and callers who do everything wrong."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.client
import json
import socket
import struct
from typing import Any

import jsonschema

from benchmarks.attack import over_http as attacks
from benchmarks.attack.over_http import CHAT, RUN, STREAM, head, post
from benchmarks.soak.load import LIMIT_S, Unexpected, World

RESPONSES = "/v1/responses"
MODEL = "drawings"
STREAMED = "content-type: application/connect+json"
BUSY = 429
LAST_FRAME = 2
"""Flag of the frame that ends a stream of Connect."""


def _post(
    world: World, body: dict[str, Any] | bytes, lines: int | None = None, path: str = CHAT
) -> tuple[int, bytes]:
    """Status and body of the answer to a request. lines: leave after so many."""
    connection = http.client.HTTPConnection("127.0.0.1", world.http_port, timeout=LIMIT_S)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {world.key}"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, data, headers)
        response = connection.getresponse()
        if lines is None:
            return response.status, response.read()
        return response.status, b"".join(response.readline() for _ in range(lines))
    finally:
        connection.close()


def _chat(world: World, wanted: str | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion about a drawing, under a schema where one is wanted."""
    url = "data:;base64," + base64.b64encode(world.rng.choice(world.material.drawings)).decode()
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    if wanted is not None:
        form = {"name": "answer", "schema": json.loads(wanted)}
        more["response_format"] = {"type": "json_schema", "json_schema": form}
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


async def _answer(world: World, body: dict[str, Any], path: str) -> Any:
    """The answer to a request that is right; None where the server is busy."""
    status, found = await asyncio.to_thread(_post, world, body, None, path)
    if status not in (200, BUSY):
        raise Unexpected(f"HTTP {status}: {found[:300]!r}")
    return json.loads(found) if status == 200 else None


def _validate(text: str, wanted: str) -> None:
    jsonschema.Draft202012Validator(json.loads(wanted)).validate(json.loads(text))


async def http_chat(world: World) -> None:
    wanted = world.rng.choice(world.material.schemas)
    answer = await _answer(world, _chat(world, wanted, max_tokens=400), CHAT)
    if answer is not None:
        _validate(answer["choices"][0]["message"]["content"], wanted)


async def http_responses(world: World) -> None:
    wanted = world.rng.choice(world.material.schemas)
    form = {"type": "json_schema", "name": "answer", "schema": json.loads(wanted)}
    body = {"model": MODEL, "input": "What is it?", "text": {"format": form}}
    answer = await _answer(world, {**body, "max_output_tokens": 400}, RESPONSES)
    if answer is not None:
        _validate(answer["output"][0]["content"][0]["text"], wanted)


async def http_stream(world: World) -> None:
    """Read to the end, or leave after a few lines."""
    lines = world.rng.choice([None, 3])
    body = _chat(world, stream=True, max_tokens=100)
    status, found = await asyncio.to_thread(_post, world, body, lines)
    if status == 200 and (lines or found.endswith(b"data: [DONE]\n\n")):
        return
    if status != BUSY:
        raise Unexpected(f"HTTP {status}: {found[-300:]!r}")


async def http_bad(world: World) -> None:
    body = world.rng.choice(
        [b"{", _chat(world, max_tokens=-1), _chat(world, '{"type": "nothing"}')]
    )
    status, found = await asyncio.to_thread(_post, world, body)
    if status != 400:
        raise Unexpected(f"HTTP {status}: {found[:300]!r}")


async def http_cut(world: World) -> None:
    """An answer under a schema that cannot be complete."""
    wanted = world.rng.choice(world.material.schemas)
    body = _chat(world, wanted, max_tokens=1)
    status, found = await asyncio.to_thread(_post, world, body)
    if status not in (422, BUSY):
        raise Unexpected(f"HTTP {status}: {found[:300]!r}")


async def http_wrong_key(world: World) -> None:
    request = post(CHAT, json.dumps(_chat(world)).encode(), key="a guess")
    await _status(world, {401}, request)


async def _status(world: World, allowed: set[int], *pieces: bytes) -> None:
    """Send bytes. The answer must have one of these statuses."""
    found = await attacks.status(world.http_port, *pieces)
    if found not in allowed:
        raise Unexpected(f"HTTP {found} for {pieces[0][:300]!r}")


async def _leave(world: World, request: bytes, after_s: float) -> None:
    """Send bytes, read nothing, and close the connection after some time."""
    unread = socket.socket()
    unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    unread.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(unread, ("127.0.0.1", world.http_port))
        await loop.sock_sendall(unread, request)
        await asyncio.sleep(after_s)
    finally:
        unread.close()


async def http_left(world: World) -> None:
    """A call whose caller leaves while the model writes."""
    request = post(CHAT, json.dumps(_chat(world, max_tokens=500)).encode(), key=world.key)
    await _leave(world, request, world.rng.random() * 0.2)


async def http_unread(world: World) -> None:
    """A stream of events that nobody reads, on a connection that is then closed."""
    body = _chat(world, stream=True, max_tokens=500, structured_outputs={"regex": "[a-z]{300,400}"})
    await _leave(world, post(CHAT, json.dumps(body).encode(), key=world.key), 1)


async def http_half_sent(world: World) -> None:
    """A body whose end never comes."""
    sized = ("content-length: 1000000", "content-type: application/json")
    await _leave(world, head(CHAT, *sized, key=world.key) + b" " * 500_000, 0.2)


async def http_slow_headers(world: World) -> None:
    """Headers whose end never comes."""
    await _leave(world, head(CHAT)[:-2] + b"x-more: ", 0.5)


@functools.cache
def _hostile_json() -> list[bytes]:
    return [one.replace(b'"fake"', b'"drawings"') for one in attacks.hostile_json().values()]


async def http_hostile_json(world: World) -> None:
    """JSON that costs a careless reader its stack, its time or its meaning."""
    body = world.rng.choice(_hostile_json())
    await _status(world, {400}, post(world.rng.choice([CHAT, RUN]), body, key=world.key))


async def http_smuggled(world: World) -> None:
    """A request with a second one inside, which must not be answered."""
    name, request = world.rng.choice(list(attacks.smuggled().items()))
    found = await attacks.responses(world.http_port, request, 0.5)
    if len(found) > 1:
        raise Unexpected(f"{name}: answered with {found}")


# Connect


def _framed(document: dict[str, Any]) -> bytes:
    data = json.dumps(document).encode()
    return struct.pack(">BI", 0, len(data)) + data


def _long_stream(world: World) -> bytes:
    """A call that streams a long answer over Connect."""
    task = {"inline": {"user": "What is it?", "grammar": {"regex": "[a-z]{300,400}"}}}
    body = _framed({"task": task, "sampling": {"maxTokens": 500}})
    return head(STREAM, STREAMED, f"content-length: {len(body)}", key=world.key) + body


async def connect_call(world: World) -> None:
    wanted = world.rng.choice(world.material.schemas)
    image = base64.b64encode(world.rng.choice(world.material.drawings)).decode()
    task = {"inline": {"user": "What is it?", "grammar": {"jsonSchema": wanted}}}
    body = {"task": task, "images": [{"data": image}], "sampling": {"maxTokens": 400}}
    answer = await _answer(world, body, RUN)
    if answer is not None:
        _validate(answer["result"]["json"], wanted)


async def connect_stream(world: World) -> None:
    """Read to the end, whose frame says that there was no error."""
    async with attacks.opened(world.http_port) as (reader, writer):
        writer.write(_long_stream(world).replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        found = await asyncio.wait_for(reader.read(), LIMIT_S)
    if not found.startswith(b"HTTP/1.1 200 "):
        raise Unexpected(f"Connect: {found[:300]!r}")
    end = found[-300:]
    if b"resource_exhausted" not in end and struct.pack(">BI", LAST_FRAME, 2) + b"{}" not in end:
        raise Unexpected(f"Connect: {end!r}")


async def connect_unread(world: World) -> None:
    """A stream that nobody reads, on a connection that is then closed."""
    await _leave(world, _long_stream(world), 1)


async def connect_half_sent(world: World) -> None:
    """A call whose end never comes."""
    sized = ("content-length: 1000000", "content-type: application/json")
    await _leave(world, head(RUN, *sized, key=world.key) + b" " * 500_000, 0.2)


_hostile_connect = functools.cache(attacks.hostile_connect)


async def connect_hostile(world: World) -> None:
    """Frames of 4 GB, packed, without an end. Streams carry their errors under the status 200."""
    first, *rest = world.rng.choice(list(_hostile_connect().values()))
    given = first.replace(b"host: a", f"host: a\r\nx-api-key: {world.key}".encode(), 1)
    await _status(world, {200, 400, 404, 413, 415, 429, 501}, given, *rest)
