"""What our server costs in front of another model server: the time that it adds to a call.

``python -m benchmarks.remote_overhead``. The same call is made directly and through ``qwen3vl serve
--engine remote``, in turns, by one caller. Three servers: llama.cpp with the bundled model, a server that
answers at once (so that nothing hides what ours takes), and our own server over gRPC on the fake engine.
llama.cpp comes from an environment of its own, see `tests.model_servers.processes`; where it is missing, it is
left out, and named.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from benchmarks.common import environment, markdown, write_results
from benchmarks.schema_answers import server
from benchmarks.server_overhead import jpeg
from benchmarks.server_overhead import server as bare_server
from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from tests.model_servers.processes import Missing, gguf_files, llama_cpp

ROOT = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"
MODEL = "instant"
MAX_TOKENS = 48
IMAGE_BYTES = 100_000
LIMIT_S = 120.0
TARGET_MS, TARGET_SHARE = 3.0, 0.05
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}  # fmt: skip
ANSWER = '{"shape": "circle", "count": 3}'
Ask = Callable[[], Awaitable[None]]


# A server that answers at once


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    if not body.get("stream"):
        message = {"role": "assistant", "content": ANSWER}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"model": MODEL, "choices": [choice], "usage": usage})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for delta, reason in (({"content": ANSWER}, None), ({}, "stop")):
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        await response.write(
            f"data: {json.dumps({'model': MODEL, 'choices': [choice]})}\n\n".encode()
        )
    end = json.dumps({"model": MODEL, "choices": [], "usage": usage})
    await response.write(f"data: {end}\n\ndata: [DONE]\n\n".encode())
    return response


async def serve_instant() -> None:
    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.get("/v1/models", _models), web.post(CHAT, _chat)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def instant() -> Iterator[str]:
    """The server in a process of its own; its URL."""
    command = [sys.executable, "-m", "benchmarks.remote_overhead", "--serve"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait(20)


# The calls


def body(model: str, image: bytes | None) -> bytes:
    """A chat completion that both servers take."""
    text = {"type": "text", "text": "Which shape is it, and how many?"}
    url = "" if image is None else base64.b64encode(image).decode()
    shown = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{url}"}}]
    schema = {"name": "answer", "schema": SCHEMA}
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": [*(shown if image else []), text]}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
    ).encode()


async def over_http(session: aiohttp.ClientSession, url: str, image: bytes | None) -> Ask:
    async with session.get(f"{url}/v1/models") as response:
        model = (await response.json())["data"][0]["id"]
    data = body(model, image)

    async def ask() -> None:
        headers = {"content-type": "application/json"}
        async with session.post(url + CHAT, data=data, headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {answer[:500]!r}")

    return ask


async def over_grpc(stack: AsyncExitStack, address: str, image: bytes | None) -> Ask:
    channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    await stack.enter_async_context(channel)
    images = [] if image is None else [pb.Image(data=image)]
    inline = pb.InlineTask(user="Which shape is it, and how many?")
    request = pb.RunTaskRequest(task=pb.Task(inline=inline), images=images)
    stub: Any = VisionServiceStub(channel)

    async def ask() -> None:
        await stub.RunTask(request, timeout=LIMIT_S)

    return ask


async def measured(direct: Ask, through: Ask, rounds: int) -> dict[str, Any]:
    """Both calls in turns; the order alternates."""
    times: dict[str, list[float]] = {"direct": [], "through": []}
    for turn in range(-10, rounds):
        pairs: Sequence[tuple[str, Ask]] = (("direct", direct), ("through", through))
        for name, ask in pairs if turn % 2 else reversed(pairs):
            begun = time.perf_counter()
            await ask()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begun))
    one, other = (statistics.median(times[name]) for name in ("direct", "through"))
    return {
        "p50 direct, ms": one,
        "p50 through ours, ms": other,
        "added, ms": other - one,
        "added, %": 100 * (other - one) / one,
        "rounds": rounds,
    }


async def http_row(direct: str, through: str, image: bytes | None, rounds: int) -> dict[str, Any]:
    limit = aiohttp.ClientTimeout(LIMIT_S)
    async with aiohttp.ClientSession(timeout=limit, trust_env=False) as session:
        calls = [await over_http(session, url, image) for url in (direct, through)]
        return await measured(calls[0], calls[1], rounds)


async def grpc_row(direct: str, through: str, image: bytes | None, rounds: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        calls = [await over_grpc(stack, address, image) for address in (direct, through)]
        return await measured(calls[0], calls[1], rounds)


NOTES = """One caller; the same call directly and through `qwen3vl serve --engine remote`, in turns; medians. \
llama.cpp: the bundled model, one thread, an answer under a JSON schema; both over HTTP with OpenAI's API. instant: a \
server that answers without computing. own gRPC: our server on the fake engine, and ours in front of it. image: a \
JPEG file of 100 KB. Targets: at most {ms:g} ms and {share:.0%} in front of llama.cpp."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=("llama.cpp", "instant", "own gRPC"))
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve_instant())
        return
    rows: list[dict[str, Any]] = []
    wanted = options.only or ("llama.cpp", "instant", "own gRPC")
    print(environment())
    with ExitStack() as stack:
        urls: dict[str, str] = {}
        if "instant" in wanted:
            urls["instant"] = stack.enter_context(instant())
        if "llama.cpp" in wanted:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                urls["llama.cpp"] = stack.enter_context(llama_cpp(gguf_files(folder)))
            except Missing as missing:
                print(f"without llama.cpp: {missing}")
        for name, url in urls.items():
            words = ("--engine", "remote", "--remote-url", url, "--http-port", "0")
            with server(*words) as (_, through):
                for what, image in (("text", None), ("image", jpeg(IMAGE_BYTES))):
                    row = asyncio.run(http_row(url, through, image, options.rounds))
                    rows.append({"server": name, "call": what, **row})
                    print(rows[-1], flush=True)
        if "own gRPC" in wanted:
            worker = stack.enter_context(bare_server("ours"))
            words = ("--engine", "remote", "--remote-url", f"grpc://{worker.address}")
            with server(*words) as (_, through):
                for what, image in (("text", None), ("image", jpeg(IMAGE_BYTES))):
                    row = asyncio.run(grpc_row(worker.address, through, image, options.rounds))
                    rows.append({"server": "own gRPC", "call": what, **row})
                    print(rows[-1], flush=True)
    write_results("remote_overhead", rows, NOTES.format(ms=TARGET_MS, share=TARGET_SHARE))
    print(markdown(rows))


if __name__ == "__main__":
    main()
