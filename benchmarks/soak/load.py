"""The mixed load: ordinary calls of every kind, callers who go away, and callers who do everything wrong.

Every kind of call says how it may end. Any other end is a failure of the soak, as is an answer
under a schema that does not validate.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import io
import json
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from examples.drawings.evaluate import encoded
from examples.drawings.scenes import draw, scene
from service.client import CHANNEL_OPTIONS, read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.attacks.http2 import Connection, message

SERVICE = b"/qwen3vl.v1.VisionService/"
WORKER = "service.structured_output.worker"
DRAWINGS, SCHEMAS = 60, 300
"""How many different images and schemas recur: callers of a real server have their set of both."""
LIMIT_S = 120.0
RELOAD_LIMIT_S = 20.0


@dataclass(frozen=True)
class Material:
    """What is sent, made once: it is the server that is measured."""

    drawings: list[bytes]
    photos: list[bytes]
    broken: dict[str, bytes]
    schemas: list[str]

    @classmethod
    def make(cls, seed: int) -> Material:
        """Drawings of the bundled model, photo-sized noise, files that are wrong, schemas."""
        rng = random.Random(seed)
        drawings = []
        for number in range(DRAWINGS):
            size = (rng.randrange(96, 320), rng.randrange(96, 320))
            kind = rng.choice(["PNG", "JPEG"])
            drawings.append(encoded(draw(scene(number), number, size), kind))
        photos = [_photo(4000, 3000, "JPEG"), _photo(3000, 2000, "PNG"), _photo(2000, 1500, "WEBP")]
        broken = {
            "cut": photos[0][: len(photos[0]) // 2],
            "text": b"no image at all",
            "gif": _photo(64, 64, "GIF"),
            "huge": _photo(12_000, 8000, "PNG", plain=True),
            "empty": b"",
        }
        return cls(drawings, photos, broken, [_schema(rng, n) for n in range(SCHEMAS)])


def _photo(width: int, height: int, kind: str, *, plain: bool = False) -> bytes:
    rng = np.random.default_rng(width)
    small = rng.integers(0, 256, (height // 50 + 1, width // 50 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(small * (0 if plain else 1)).resize((width, height))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def _schema(rng: random.Random, number: int) -> str:
    parts: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": rng.randrange(1, 99)},
        {"type": "boolean"},
        {"enum": ["red", "green", f"colour {number}"]},
        {"type": "string", "maxLength": rng.randrange(4, 20)},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    ]
    properties = {f"field_{number}_{n}": rng.choice(parts) for n in range(rng.randrange(1, 5))}
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )


class Unexpected(Exception):
    """A call ended in a way that its kind does not allow."""


@dataclass
class World:
    """A server under load and what was seen of it. server: its process, whose workers are killed."""

    address: str
    http_port: int
    key: str
    keys_file: Path
    server: psutil.Process
    material: Material
    rng: random.Random
    channel: grpc.aio.Channel
    counts: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    failures: list[str] = field(default_factory=list)

    @property
    def stub(self) -> Any:
        return VisionServiceStub(self.channel)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-api-key", self.key),)

    def drawing(self) -> pb.Image:
        return pb.Image(data=self.rng.choice(self.material.drawings))

    def sampling(self, max_tokens: int) -> pb.SamplingOptions:
        if self.rng.random() < 0.5:
            return pb.SamplingOptions(max_tokens=max_tokens)
        seed = self.rng.randrange(1000)
        return pb.SamplingOptions(max_tokens=max_tokens, temperature=1.0, top_p=0.9, seed=seed)

    def task(self, user: str = "What is it?", **grammar: Any) -> pb.Task:
        constraint = pb.Grammar(**grammar) if grammar else None
        return pb.Task(inline=pb.InlineTask(user=user, grammar=constraint))

    def under_a_schema(self, images: int = 1) -> tuple[pb.RunTaskRequest, Any]:
        schema = self.rng.choice(self.material.schemas)
        request = pb.RunTaskRequest(
            task=self.task(json_schema=schema),
            images=[self.drawing() for _ in range(images)],
            sampling=self.sampling(400),
        )
        return request, json.loads(schema)

    def long_stream(self) -> pb.StreamTaskRequest:
        return pb.StreamTaskRequest(
            task=self.task(regex="[a-z]{300,400}"), sampling=pb.SamplingOptions(max_tokens=500)
        )

    async def call(self, method: str, request: Any, timeout: float = LIMIT_S) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=timeout)


async def analyze(world: World) -> None:
    request = pb.AnalyzeImageRequest(images=[world.drawing()])
    response = await world.call("AnalyzeImage", request)
    if not response.analysis.description:
        raise Unexpected("an analysis without a description")


async def schema(world: World) -> None:
    request, wanted = world.under_a_schema(world.rng.randrange(3))
    result = (await world.call("RunTask", request)).result
    jsonschema.Draft202012Validator(wanted).validate(json.loads(result.json))


async def regex(world: World) -> None:
    pattern = f"[a-z]{{1,8}} (red|green) {world.rng.randrange(100)}"
    request = pb.RunTaskRequest(task=world.task(regex=pattern), sampling=world.sampling(100))
    text = (await world.call("RunTask", request)).result.text
    if not re.fullmatch(pattern, text):
        raise Unexpected(f"{text!r} does not match {pattern!r}")


async def photo(world: World) -> None:
    image = pb.Image(data=world.rng.choice(world.material.photos))
    options = ["yes", "no"]
    task = world.task(choice=pb.Choice(options=options))
    result = (await world.call("RunTask", pb.RunTaskRequest(task=task, images=[image]))).result
    if result.text not in options:
        raise Unexpected(f"{result.text!r} is not a choice")


async def stream(world: World) -> None:
    request, wanted = world.under_a_schema()
    streamed = pb.StreamTaskRequest.FromString(request.SerializeToString())
    text = ""
    async for event in world.stub.StreamTask(streamed, metadata=world.metadata, timeout=LIMIT_S):
        text += event.delta
        last = event
    if text != last.result.text:
        raise Unexpected("the pieces of a stream are not its result")
    jsonschema.Draft202012Validator(wanted).validate(json.loads(last.result.json))


async def slow_reader(world: World) -> None:
    request = world.long_stream()
    async for _ in world.stub.StreamTask(request, metadata=world.metadata, timeout=LIMIT_S):
        await asyncio.sleep(0.01)


async def cancelled_stream(world: World) -> None:
    call = world.stub.StreamTask(world.long_stream(), metadata=world.metadata, timeout=LIMIT_S)
    for _ in range(world.rng.randrange(1, 20)):
        await call.read()
    call.cancel()
    await call.code()


async def cancelled_call(world: World) -> None:
    request, _ = world.under_a_schema()
    call = world.stub.RunTask(request, metadata=world.metadata, timeout=LIMIT_S)
    await asyncio.sleep(world.rng.random() * 0.2)
    call.cancel()
    await call.code()


async def short_deadline(world: World) -> None:
    request = world.long_stream()
    call = world.stub.StreamTask(request, metadata=world.metadata, timeout=0.02)
    async for _ in call:
        pass


async def unread(world: World) -> None:
    """Streams on a connection that takes no byte, which is then closed."""
    host, _, port = world.address.rpartition(":")
    connection = await Connection.open(host, int(port), window=0)
    body = message(world.long_stream().SerializeToString())
    for _ in range(4):
        connection.call(SERVICE + b"StreamTask", body, (b"x-api-key", world.key.encode()))
    await asyncio.sleep(1)
    await connection.close()


async def half_sent(world: World) -> None:
    """A request whose end never comes, on a connection that is then closed."""
    host, _, port = world.address.rpartition(":")
    connection = await Connection.open(host, int(port))
    call = connection.call(SERVICE + b"RunTask", None, (b"x-api-key", world.key.encode()))
    await connection.send(call, message(bytes(500_000), length=1_000_000))
    await asyncio.sleep(0.2)
    await connection.close()


async def bad_image(world: World) -> None:
    kind = world.rng.choice(list(world.material.broken))
    image = pb.Image(data=world.material.broken[kind])
    await world.call("RunTask", pb.RunTaskRequest(task=world.task(), images=[image]))


async def bad_request(world: World) -> None:
    task = world.rng.choice(
        [
            world.task(json_schema='{"type": "nothing"}'),
            world.task(json_schema="{"),
            world.task(regex="(a"),
            pb.Task(name="no-such-task"),
            world.task("word " * 20_000),
            world.task(""),
        ]
    )
    await world.call("RunTask", pb.RunTaskRequest(task=task))


async def truncated(world: World) -> None:
    request, _ = world.under_a_schema()
    request.sampling.max_tokens = 1
    await world.call("RunTask", request)


async def wrong_key(world: World) -> None:
    await dataclasses.replace(world, key="a guess").call("GetModel", pb.GetModelRequest())


async def lookups(world: World) -> None:
    """The calls that do not generate, on a connection of their own."""
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(world.address, options=options) as channel:
        one = dataclasses.replace(world, channel=channel)
        await one.call("GetModel", pb.GetModelRequest())
        await one.call("ListTasks", pb.ListTasksRequest())
        grammar = pb.Grammar(json_schema=world.rng.choice(world.material.schemas))
        await one.call("ValidateSchema", pb.ValidateSchemaRequest(grammar=grammar))
        health = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        if response.status != health_pb2.HealthCheckResponse.SERVING:
            raise Unexpected("health is not SERVING")


async def new_schema(world: World) -> None:
    """A schema that nobody has sent before: work for a process that analyses grammars."""
    content = json.loads(world.rng.choice(world.material.schemas))
    content["title"] = f"{world.rng.random()}"
    grammar = pb.Grammar(json_schema=json.dumps(content))
    await world.call("ValidateSchema", pb.ValidateSchemaRequest(grammar=grammar))


async def burst(world: World) -> None:
    """More calls at once than there are slots."""
    request = pb.RunTaskRequest(task=world.task(regex="[a-z]{5}"))
    await asyncio.gather(*(world.call("RunTask", request) for _ in range(24)))


@dataclass(frozen=True)
class Kind:
    """A kind of call. weight: how often. ends: how it may end beside OK."""

    run: Callable[[World], Awaitable[None]]
    weight: int
    ends: frozenset[str] = frozenset()
    ok: bool = True


async def once(world: World, kind: Kind) -> None:
    """One call of a kind, counted by its end."""
    name = kind.run.__name__
    try:
        await asyncio.wait_for(kind.run(world), LIMIT_S + 10)
        end = "OK"
    except grpc.aio.AioRpcError as error:
        found = read_error(error)
        end = found.reason or error.code().name
        message = f"{end}: {found.message}"
    except (Unexpected, jsonschema.ValidationError, ValueError, TimeoutError, OSError) as error:
        end = type(error).__name__
        message = f"{end}: {error}"
    world.counts[name][end] += 1
    if not (kind.ok if end == "OK" else end in kind.ends):
        world.failures.append(f"{name}: {'it succeeded' if end == 'OK' else message}")


async def kill_workers(world: World, stop: asyncio.Event, every_s: float) -> None:
    """Kill a process that analyses grammars now and then, as a system short of memory does."""
    while not await _stopped(stop, every_s):
        workers = []
        for process in world.server.children(recursive=True):
            try:
                if WORKER in " ".join(process.cmdline()):
                    workers.append(process)
            except psutil.NoSuchProcess:
                continue
        if workers:
            world.rng.choice(workers).kill()
            world.counts["killed worker"]["done"] += 1


async def rotate_keys(world: World, stop: asyncio.Event, every_s: float) -> None:
    """Replace one of the keys now and then: the new one must work soon, the old one must not."""
    old, number = "", 0
    while not await _stopped(stop, every_s):
        number += 1
        new = f"rotating key {number}"
        write_keys(world.keys_file, {"soak": world.key, "rotating": new})
        if number % 2:
            world.server.send_signal(signal.SIGHUP)
        if await _ends_with(world, new, "OK") and await _ends_with(world, old, "API_KEY_INVALID"):
            world.counts["rotated key"]["done"] += 1
        else:
            world.failures.append(f"keys were not reloaded within {RELOAD_LIMIT_S:g} s")
        old = new


async def _ends_with(world: World, key: str, wanted: str) -> bool:
    """Whether a call with this key comes to end so. No key: nothing to ask."""
    end = time.monotonic() + RELOAD_LIMIT_S
    while key and time.monotonic() < end:
        try:
            await dataclasses.replace(world, key=key).call("GetModel", pb.GetModelRequest())
            found = "OK"
        except grpc.aio.AioRpcError as error:
            found = read_error(error).reason or error.code().name
        if found == wanted:
            return True
        await asyncio.sleep(0.2)
    return not key


def write_keys(path: Path, keys: dict[str, str]) -> None:
    """A keys file, put in place of the old one at once."""
    fresh = path.with_suffix(".new")
    lines = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in keys.items()]
    fresh.write_text("\n".join(lines) + "\n")
    fresh.replace(path)


async def _stopped(stop: asyncio.Event, after_s: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), after_s)
    except asyncio.TimeoutError:
        return False
    return True


async def until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Wait for a condition. Returns whether it came true in time."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.2)
    return True
