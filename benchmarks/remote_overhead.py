"""What our server costs in front of another model server: the time that it adds to a call.

``python -m benchmarks.remote_overhead``. The same call is made directly, through a proxy that checks nothing, and
through ``qwen3vl serve --engine remote`` over HTTP and over gRPC, in turns, by one caller. Four servers: llama.cpp
with the bundled model, llama.cpp with a larger one of random weights, a server that answers at once (so that
nothing hides what ours takes), and our own server over gRPC on the fake engine, without the proxy. llama.cpp
comes from an environment of its own, see `tests.model_servers.processes`; where it is missing, it is left out,
and named.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from benchmarks.common import environment, markdown, write_results
from benchmarks.overhead import started
from benchmarks.schema_answers import addressed_server, server
from benchmarks.server_overhead import jpeg
from benchmarks.server_overhead import server as bare_server
from examples.drawings.samples import FOLDER as DRAWINGS
from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.tasks.image_analysis import FIELDS, IMAGE_ANALYSIS, STRING_FIELDS
from service.wiring import BUNDLED_MODEL
from tests.model_servers.processes import Missing, gguf_files, llama_cpp

CHAT = "/v1/chat/completions"
MODEL = "instant"
MAX_TOKENS = 48
IMAGE_BYTES = 100_000
LIMIT_S = 120.0
LLAMA_CPP, LARGER, INSTANT, OWN = "llama.cpp", "llama.cpp, larger model", "instant", "own gRPC"
LARGER_ROUNDS = 30
BODY_LIMIT = 1 << 24
DIRECT, PROXY, OURS, GRPC = "direct", "bare proxy", "through ours", "through ours, gRPC"
LOOP = ("--event-loop", "uvloop")
TARGET_MS, TARGET_SHARE = 3.0, 0.05
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["circle", "square"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}  # fmt: skip
ANSWER = '{"shape": "circle", "count": 3}'
LABELS = ("circle", "square", "nothing")
Ask = Callable[[], Awaitable[int]]
"""Makes a call; the number of tokens of its answer."""


# A server that answers at once, and a proxy that checks nothing


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
    app = web.Application(client_max_size=BODY_LIMIT)
    app.add_routes([web.get("/v1/models", _models), web.post(CHAT, _chat)])
    await _serve(app)


async def serve_proxy(url: str) -> None:
    """Sends each request on as it is, and its answer back."""
    limit = aiohttp.ClientTimeout(LIMIT_S)
    async with aiohttp.ClientSession(timeout=limit, trust_env=False) as session:

        async def forward(request: web.Request) -> web.Response:
            kept = request.headers.get("content-type")
            headers = {"content-type": kept} if kept else None
            async with session.request(
                request.method, url + request.path, data=await request.read(), headers=headers
            ) as response:
                answer = await response.read()
                headers = {"content-type": response.headers["content-type"]}
                return web.Response(body=answer, status=response.status, headers=headers)

        app = web.Application(client_max_size=BODY_LIMIT)
        app.add_routes([web.route("*", "/{path:.*}", forward)])
        await _serve(app)


async def _serve(app: web.Application) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


def running(stack: ExitStack, *words: str) -> str:
    """One of both in a process of its own; its URL."""
    (port,), _ = stack.enter_context(started("benchmarks.remote_overhead", "--serve", *words))
    return f"http://127.0.0.1:{port}"


# llama.cpp


def bundled_llama_cpp(stack: ExitStack) -> str:
    """With the bundled model; the URL. Raises ``Missing``."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return stack.enter_context(llama_cpp(gguf_files(folder)))


def larger_llama_cpp(stack: ExitStack) -> str:
    """With a model of random weights; the URL. Raises ``Missing``."""
    from benchmarks.random_model import write_random_model  # torch: the proxy starts without it

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    checkpoint = write_random_model(folder / "checkpoint", BUNDLED_MODEL, size="small")
    return stack.enter_context(llama_cpp(gguf_files(folder / "gguf", checkpoint)))


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


def bounded(asked: Mapping[str, Question]) -> dict[str, Question]:
    """The same, with fields of an analysis whose values are listed: a model of random weights would
    write strings without end."""
    label = {"enum": list(LABELS)}
    labels = {"type": "array", "items": label, "minItems": 1, "maxItems": 1}
    schema = {
        "type": "object",
        "properties": {name: label if name in STRING_FIELDS else labels for name in FIELDS},
        "required": list(FIELDS),
        "additionalProperties": False,
    }
    short = {
        name: replace(one, max_tokens=512) for name, one in asked.items() if name != "analysis"
    }
    return {**short, "analysis": replace(asked["analysis"], schema=json.dumps(schema))}


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

    async def ask() -> int:
        headers = {"content-type": "application/json"}
        async with session.post(url + CHAT, data=data, headers=headers) as response:
            answer = await response.read()
            if response.status != 200:
                raise RuntimeError(f"{url} answers {response.status}: {answer[:500]!r}")
        return int(json.loads(answer)["usage"]["completion_tokens"])

    return ask


async def over_grpc(stack: AsyncExitStack, address: str, asked: Question, *, guided: bool) -> Ask:
    """guided: with the schema and the limit of tokens, which the fake engine does not follow."""
    channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    await stack.enter_async_context(channel)
    images = [] if asked.image is None else [pb.Image(data=asked.image)]
    inline = pb.InlineTask(system=asked.system, user=asked.text)
    sampling = None
    if guided:
        inline.grammar.json_schema = asked.schema
        sampling = pb.SamplingOptions(max_tokens=asked.max_tokens)
    request = pb.RunTaskRequest(task=pb.Task(inline=inline), images=images, sampling=sampling)
    stub: Any = VisionServiceStub(channel)

    async def ask() -> int:
        response = await stub.RunTask(request, timeout=LIMIT_S)
        return int(response.result.usage.output_tokens)

    return ask


async def measured(calls: Mapping[str, Ask], rounds: int, warmup: int = 10) -> dict[str, Any]:
    """The calls in turns; each turn begins with another one. The row of the report."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    tokens: dict[str, set[int]] = {name: set() for name in calls}
    pairs = list(calls.items())
    for turn in range(-warmup, rounds):
        first = turn % len(pairs)
        for name, ask in pairs[first:] + pairs[:first]:
            begun = time.perf_counter()
            count = await ask()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - begun))
                tokens[name].add(count)
    medians = {name: statistics.median(one) for name, one in times.items()}
    direct = medians[DIRECT]
    row = {f"p50 {name}, ms": one for name, one in medians.items()}
    for name, over in ((OURS, ""), (GRPC, " over gRPC")):
        if name in medians:
            added = medians[name] - direct
            row |= {f"added{over}, ms": added, f"added{over}, %": 100 * added / direct}
    if PROXY in medians:
        row["added by a bare proxy, ms"] = medians[PROXY] - direct
    counts = sorted(set().union(*tokens.values()))
    return {**row, "tokens": ", ".join(map(str, counts)), "rounds": rounds}


async def http_row(
    urls: Mapping[str, str], address: str, asked: Question, rounds: int, warmup: int
) -> dict[str, Any]:
    """urls: where the call goes over HTTP. address: of our server over gRPC."""
    limit = aiohttp.ClientTimeout(LIMIT_S)
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=limit, trust_env=False)
        )
        calls = {name: await over_http(session, url, asked) for name, url in urls.items()}
        calls[GRPC] = await over_grpc(stack, address, asked, guided=True)
        return await measured(calls, rounds, warmup)


async def grpc_row(addresses: Mapping[str, str], asked: Question, rounds: int) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        calls = {
            name: await over_grpc(stack, one, asked, guided=False)
            for name, one in addresses.items()
        }
        return await measured(calls, rounds)


NOTES = """One caller; the same call directly, through a bare proxy, and through `qwen3vl serve --engine remote \
--event-loop uvloop`, in turns; medians. Python {python}. bare proxy: what one would put in front otherwise, \
in aiohttp; it sends the body on, returns the answer, and checks nothing. llama.cpp: the bundled model, one \
thread, an answer under a JSON schema; over HTTP with OpenAI's API, and through ours also over gRPC \
(RunTask). llama.cpp, larger model: the same with random weights of Qwen3-VL's shape, 40 million parameters, \
which write as much white space as the schema lets them; tokens: of the answers, the same for all. Both keep \
their prompt between calls, so only the answer is computed. instant: a server that answers without \
computing. own gRPC: our server on the fake engine, and ours in front of it. text, image: a short answer, \
with a JPEG file of 100 KB; analysis: the task of AnalyzeImage on a drawing; with the larger model its \
fields take one of three values, so that it ends. Targets: at most {ms:g} ms in front of llama.cpp with the \
bundled model, and {share:.0%} of a call to the larger one. The bundled model is so small that a text takes \
it 7 ms: {share:.0%} of that is 0.35 ms, less than a server in Python takes to read a request and to \
validate its answer. Its rows show the milliseconds; those of the larger model show their share, and hardly \
the milliseconds, because its own time varies by more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--larger-rounds", type=int, default=LARGER_ROUNDS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=(LLAMA_CPP, LARGER, INSTANT, OWN))
    options = parser.parse_args()
    if options.serve:
        name, *urls = options.serve
        asyncio.run(serve_proxy(*urls) if name == "proxy" else serve_instant())
        return
    rows: list[dict[str, Any]] = []

    def add(name: str, call: str, row: dict[str, Any]) -> None:
        rows.append({"server": name, "call": call, **row})
        print(rows[-1], flush=True)

    wanted = options.only or (INSTANT, LLAMA_CPP, LARGER, OWN)
    print(environment())
    for name in (one for one in wanted if one != OWN):
        with ExitStack() as stack:
            try:
                urls, address = _in_front_of(stack, name)
            except Missing as missing:
                print(f"without {name}: {missing}")
                continue
            asked = bounded(questions()) if name == LARGER else questions()
            if name == INSTANT:
                del asked["analysis"]  # its answer is not one
            rounds = (options.larger_rounds, 2) if name == LARGER else (options.rounds, 10)
            for call, one in asked.items():
                add(name, call, asyncio.run(http_row(urls, address, one, *rounds)))
    if OWN in wanted:
        with ExitStack() as stack:
            worker = stack.enter_context(bare_server("ours")).address
            words = ("--engine", "remote", "--remote-url", f"grpc://{worker}", *LOOP)
            _, through = stack.enter_context(server(*words))
            for call in ("text", "image"):
                addresses = {DIRECT: worker, OURS: through}
                add(OWN, call, asyncio.run(grpc_row(addresses, questions()[call], options.rounds)))
    write_results(
        "remote_overhead",
        rows,
        NOTES.format(ms=TARGET_MS, share=TARGET_SHARE, python=sys.version.split("\n")[0]),
    )
    print(markdown(rows))


def _in_front_of(stack: ExitStack, name: str) -> tuple[dict[str, str], str]:
    """The URLs of a server, of a bare proxy in front of it, and of ours, and the address of ours over gRPC.
    Raises ``Missing``."""
    if name == INSTANT:
        url = running(stack, "instant")
    else:
        url = (larger_llama_cpp if name == LARGER else bundled_llama_cpp)(stack)
    words = ("--engine", "remote", "--remote-url", url, "--http-port", "0", *LOOP)
    _, address, through = stack.enter_context(addressed_server(*words))
    assert through is not None
    return {DIRECT: url, PROXY: running(stack, "proxy", url), OURS: through}, address


if __name__ == "__main__":
    main()
