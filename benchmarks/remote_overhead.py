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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from benchmarks.common import environment, markdown, write_results
from benchmarks.schema_answers import server
from benchmarks.server_overhead import jpeg
from benchmarks.server_overhead import server as bare_server
from examples.drawings.samples import FOLDER as DRAWINGS
from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.tasks.image_analysis import IMAGE_ANALYSIS
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


@dataclass(frozen=True)
class Question:
    """What is asked, over both APIs. system: text before the question."""

    text: str
    schema: str
    max_tokens: int
    system: str = ""
    image: bytes | None = None
    kind: str = "jpeg"


def questions() -> dict[str, Question]:
    """Short answers, and the task of AnalyzeImage on a drawing."""
    short = Question("Which shape is it, and how many?", json.dumps(SCHEMA), MAX_TOKENS)
    assert IMAGE_ANALYSIS.grammar is not None
    drawing = sorted(DRAWINGS.glob("*-*.png"))[0].read_bytes()
    analysis = Question(
        IMAGE_ANALYSIS.user,
        IMAGE_ANALYSIS.grammar.source,
        512,
        IMAGE_ANALYSIS.system,
        drawing,
        "png",
    )
    return {
        "text": short,
        "image": replace(short, image=jpeg(IMAGE_BYTES)),
        "analysis": analysis,
    }


def body(model: str, asked: Question) -> bytes:
    """A chat completion that both servers take."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": asked.text}]
    if asked.image is not None:
        url = f"data:image/{asked.kind};base64,{base64.b64encode(asked.image).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    system = [{"role": "system", "content": asked.system}] if asked.system else []
    schema = {"name": "answer", "schema": json.loads(asked.schema)}
    return json.dumps(
        {
            "model": model,
            "messages": [*system, {"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": asked.max_tokens,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
    ).encode()


async def over_http(session: aiohttp.ClientSession, url: str, asked: Question) -> Ask:
    async with session.get(f"{url}/v1/models") as response:
        model = (await response.json())["data"][0]["id"]
    data = body(model, asked)

    async def ask() -> None:
        headers = {"content-type": "application/json"}
        async with session.post(url + CHAT, data=data, headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {answer[:500]!r}")

    return ask


async def over_grpc(stack: AsyncExitStack, address: str, asked: Question) -> Ask:
    channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    await stack.enter_async_context(channel)
    images = [] if asked.image is None else [pb.Image(data=asked.image)]
    inline = pb.InlineTask(user=asked.text)
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


async def http_row(direct: str, through: str, asked: Question, rounds: int) -> dict[str, Any]:
    limit = aiohttp.ClientTimeout(LIMIT_S)
    async with aiohttp.ClientSession(timeout=limit, trust_env=False) as session:
        calls = [await over_http(session, url, asked) for url in (direct, through)]
        return await measured(calls[0], calls[1], rounds)


async def grpc_row(direct: str, through: str, asked: Question, rounds: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        calls = [await over_grpc(stack, address, asked) for address in (direct, through)]
        return await measured(calls[0], calls[1], rounds)


NOTES = """One caller; the same call directly and through `qwen3vl serve --engine remote`, in turns; medians. \
llama.cpp: the bundled model, one thread, an answer under a JSON schema; both over HTTP with OpenAI's API. instant: a \
server that answers without computing. own gRPC: our server on the fake engine, and ours in front of it. text, \
image: an answer of 13 tokens, with a JPEG file of 100 KB; analysis: the task of AnalyzeImage on a drawing. \
Targets: at most {ms:g} ms in front of llama.cpp, and {share:.0%} of the call. The model is so small that a text \
takes it 8 ms: {share:.0%} of that is 0.4 ms, less than any server in Python takes to read a request and to validate \
its answer. The table of targets has that line, and the analysis by itself."""


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
                for what, asked in questions().items():
                    if name != "llama.cpp" and what == "analysis":
                        continue  # its answer is not one
                    row = asyncio.run(http_row(url, through, asked, options.rounds))
                    rows.append({"server": name, "call": what, **row})
                    print(rows[-1], flush=True)
        if "own gRPC" in wanted:
            worker = stack.enter_context(bare_server("ours"))
            words = ("--engine", "remote", "--remote-url", f"grpc://{worker.address}")
            with server(*words) as (_, through):
                for what, asked in questions().items():
                    if what == "analysis":
                        continue
                    row = asyncio.run(grpc_row(worker.address, through, asked, options.rounds))
                    rows.append({"server": "own gRPC", "call": what, **row})
                    print(rows[-1], flush=True)
    write_results("remote_overhead", rows, NOTES.format(ms=TARGET_MS, share=TARGET_SHARE))
    print(markdown(rows))


if __name__ == "__main__":
    main()
