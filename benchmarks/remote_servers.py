"""The bundled model on other model servers: are answers valid, and are they right?

``python -m benchmarks.remote_servers [--schemas FILE.jsonl]``. llama.cpp, mistral.rs and a server that
ignores every schema are asked directly, and through ``qwen3vl serve --engine remote``. Two tables:

- Validity: one answer to each schema of a collection. An answer with status 200 and finish reason ``stop``
  that is not valid is one that a caller of the bare server has to find. Judged by jsonschema alone.
- Accuracy: AnalyzeImage on drawings that the model has not seen, beside the reference engine.

The servers come from an environment of their own, see `tests.model_servers.processes`; those that are missing
are left out, and named.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web
from PIL import Image

from benchmarks.collection import Case, collection_argument, read_collection
from benchmarks.common import RESULTS, environment, markdown, write_results
from benchmarks.judge import Judge
from benchmarks.mask_engines import schema_text
from benchmarks.schema_answers import ADMISSION, PROMPT, Call, caller_of, server
from examples.drawings.evaluate import Score, score_analyses, serving
from lmdeploy_ext.encoder.sizes import smart_resize
from service.client import CHANNEL_OPTIONS
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.wiring import BUNDLED_MODEL
from tests.host_runtime.server import serve as lmdeploy
from tests.model_servers.processes import Missing, gguf_files, llama_cpp, mistral_rs

MAX_TOKENS = 192
TEMPERATURE = 1.0
CALLERS = 4
ASK_LIMIT_S = 120.0
MISTRAL_RS_MODEL = "drawings"
"""mistral.rs lists each model twice, the second time as ``default``."""
LMDEPLOY_DRAWINGS = 32
"""TurboMind on the host runtime is slow."""
UNAVAILABLE = ("BACKEND_UNREACHABLE", "ENGINE_UNHEALTHY", "ENGINE_STALLED")
"""Reasons of a server behind ours that has died; asked again, as a client does."""
ATTEMPTS, PAUSE_S = 20, 1.0
RESIZING = "--remote-resize"
"""How names of rows end whose images our server resizes."""
STEP = 32
"""Sides of an image in tokens: patches of 16 pixels, two by two."""
IGNORED = (
    "The sea is blue.",
    "{}",
    '{"answer": "sea"}',
    "[]",
    "null",
    '```json\n{"a": 1}\n```',
    "7",
    '"sea"',
)
"""What a server writes that ignores schemas, in turns."""


@contextmanager
def ignoring() -> Iterator[str]:
    """A server with OpenAI's API that ignores ``response_format``; its URL."""
    import threading

    texts = itertools.cycle(IGNORED)

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        text, usage = next(texts), {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response({"model": "m", "choices": [choice], "usage": usage})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for delta, reason in (({"content": text}, None), ({}, "stop")):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {"model": "m", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", chat)])
    loop, runner = asyncio.new_event_loop(), web.AppRunner(app, access_log=None)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    url = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(runner.cleanup())
        loop.close()


def settings(name: str, url: str) -> tuple[str, ...]:
    """Settings of our server in front of a server."""
    words = ["--engine", "remote", "--remote-url", url]
    if name.startswith("mistral.rs"):
        words += ["--remote-model", MISTRAL_RS_MODEL]
    if name.endswith(RESIZING):
        low, high = bounds()
        words += [
            "--remote-resize",
            "--remote-min-pixels",
            str(low),
            "--remote-max-pixels",
            str(high),
        ]
    return tuple(words)


def bounds() -> tuple[int, int]:
    """Smallest and largest area of an image in the model's own processing, in pixels."""
    size = json.loads((BUNDLED_MODEL / "preprocessor_config.json").read_text())["size"]
    return size["shortest_edge"], size["longest_edge"]


# Validity


@dataclass(frozen=True)
class Bare:
    """The answer of a bare server. outcome: valid, invalid, unknown, cut, refused, died, silent."""

    number: int
    outcome: str
    status: int


async def each(
    cases: Sequence[Case], ask: Callable[[int, Case], Awaitable[Any]], minutes: float
) -> list[Any]:
    """Ask about every schema, some at a time. minutes: no question begins later."""
    waiting, found = iter(enumerate(cases)), []
    deadline = time.monotonic() + 60 * minutes

    async def caller() -> None:
        for number, case in waiting:
            if time.monotonic() > deadline:
                return
            found.append(await ask(number, case))
            if len(found) % 100 == 0:
                print(f"  {len(found)} of {len(cases)}", flush=True)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return found


async def bare_answers(url: str, cases: Sequence[Case], seeds: bool, minutes: float) -> list[Bare]:
    """One answer to each schema, from the server itself."""
    judge, limit = Judge(), aiohttp.ClientTimeout(ASK_LIMIT_S)
    async with aiohttp.ClientSession(timeout=limit, trust_env=False) as session:
        async with session.get(f"{url}/v1/models") as response:
            model = (await response.json())["data"][-1]["id"]

        async def ask(number: int, case: Case) -> Bare:
            head = {
                "model": model, "messages": [{"role": "user", "content": PROMPT}], "temperature": TEMPERATURE,
                "max_tokens": MAX_TOKENS, **({"seed": number} if seeds else {}),
            }  # fmt: skip
            form = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}'
            form = form.replace("SCHEMA", schema_text(case.schema))
            body = f'{json.dumps(head)[:-1]}, "response_format": {form}}}'
            for attempt in range(3):
                try:
                    async with session.post(
                        f"{url}/v1/chat/completions", data=body.encode(),
                        headers={"content-type": "application/json"},
                    ) as response:  # fmt: skip
                        status, data = response.status, await response.read()
                    break
                except asyncio.TimeoutError:
                    return Bare(number, "silent", 0)
                except aiohttp.ClientError:  # it died, of this question or of another one
                    if attempt == 2:
                        return Bare(number, "died", 0)
                    await _alive(session, url)
            if status != 200:
                return Bare(number, "refused", status)
            choice = json.loads(data)["choices"][0]
            if choice["finish_reason"] == "length":
                return Bare(number, "cut", status)
            text = choice["message"]["content"]
            outcome = await judge.verdict(schema_text(case.schema), text or "")
            return Bare(number, outcome, status)

        found = await each(cases, ask, minutes)
    await judge.close()
    return found


async def _alive(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until a server that was started again answers."""
    for _ in range(300):
        try:
            async with session.get(f"{url}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientError:
            pass
        await asyncio.sleep(0.2)


async def our_answers(
    address: str, cases: Sequence[Case], seeds: bool, minutes: float
) -> list[Call]:
    """One answer to each schema, through our server."""
    judge = Judge()
    async with caller_of(address) as asking:

        async def ask(number: int, case: Case) -> Call:
            sampling = pb.SamplingOptions(temperature=TEMPERATURE, max_tokens=MAX_TOKENS)
            if seeds:
                sampling.seed = number
            for _ in range(ATTEMPTS):
                call = await asking(number, case, sampling)
                if call.reason not in UNAVAILABLE:
                    break
                await asyncio.sleep(PAUSE_S)  # it is being started again
            if call.reason != "OK":
                return call
            return replace(call, verdict=await judge.verdict(schema_text(case.schema), call.text))

        found = await each(cases, ask, minutes)
    await judge.close()
    return found


def validity_row(
    name: str, cases: Sequence[Case], bare: Sequence[Bare], ours: Sequence[Call]
) -> dict[str, Any]:
    outcomes = Counter(one.outcome for one in bare)
    reasons = Counter(one.reason for one in ours)
    verdicts = Counter(one.verdict for one in ours if one.reason == "OK")
    return {
        "server": name,
        "schemas": len(cases),
        "bare: asked": len(bare),
        "bare: 200, valid": outcomes["valid"],
        "bare: 200, invalid": outcomes["invalid"],
        "bare: 200, not judged": outcomes["unknown"],
        "bare: 200, cut by max_tokens": outcomes["cut"],
        "bare: refused": outcomes["refused"],
        "bare: server died": outcomes["died"],
        "bare: no answer in time": outcomes["silent"],
        "ours: asked": len(ours),
        "ours: OK": reasons["OK"],
        "ours: OK, invalid": verdicts["invalid"],
        "ours: OK, not judged": verdicts["unknown"],
        "ours: OUTPUT_INVALID": reasons["OUTPUT_INVALID"],
        "ours: truncated": reasons["OUTPUT_TRUNCATED"],
        "ours: refused by the server": reasons["BACKEND_REFUSED"],
        "ours: server died": sum(reasons[one] for one in UNAVAILABLE),
        "ours: schema refused": sum(n for one, n in reasons.items() if one.startswith(ADMISSION)),
        "reasons": reasons,
    }


def validity(
    servers: dict[str, str], cases: Sequence[Case], minutes: float
) -> list[dict[str, Any]]:
    rows = []
    for name, url in servers.items():
        seeds = not name.startswith("mistral.rs")
        print(f"== {name}: bare", flush=True)
        bare = asyncio.run(bare_answers(url, cases, seeds, minutes))
        print(f"== {name}: through our server", flush=True)
        with server(*settings(name, url)) as (_, address):
            ours = asyncio.run(our_answers(address, cases, seeds, minutes))
        rows.append(validity_row(name, cases, bare, ours))
        print(rows[-1], flush=True)
    return rows


# Accuracy


def resized(data: bytes) -> bytes:
    """The image in the size that the model's own processing gives it, by bicubic interpolation."""
    with Image.open(io.BytesIO(data)) as image:
        colours = image.convert("RGB")
    height, width = smart_resize(colours.height, colours.width, STEP, *bounds())
    buffer = io.BytesIO()
    colours.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def accuracy_row(name: str, score: Score) -> dict[str, Any]:
    names = ("whole object list", "scene", "lighting", "every field")
    return {
        "engine": name,
        "drawings": score.asked["scene"],
        **{f"{one}, %": 100 * score.share(one) for one in names},
    }


async def reference_score(count: int) -> Score:
    async with serving(BUNDLED_MODEL) as stub:
        return await score_analyses(stub, count)


def remote_score(
    name: str, url: str, count: int, prepare: Callable[[bytes], bytes] | None
) -> Score:
    async def run(address: str) -> Score:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = VisionServiceStub(channel)
            return await score_analyses(stub, count, prepare=prepare or (lambda data: data))

    with server(*settings(name, url)) as (_, address):
        return asyncio.run(run(address))


@dataclass(frozen=True)
class Engine:
    """A row of the table of accuracy. server: name of what `Servers` starts. prepare: changes the file of
    each image before it is sent."""

    name: str
    server: str
    prepare: Callable[[bytes], bytes] | None = None


BOUNDED = "llama.cpp, 40 to 64 tokens"
LMDEPLOY = "LMDeploy, TurboMind on a CPU"
ENGINES = (
    Engine("llama.cpp", "llama.cpp"),
    Engine(BOUNDED, BOUNDED),
    *(
        Engine(f"{server}, {how}", server, prepare)
        for server in ("llama.cpp", "mistral.rs", LMDEPLOY)
        for how, prepare in (("resized before", resized), (RESIZING, None))
    ),
    Engine("mistral.rs", "mistral.rs"),
    Engine(LMDEPLOY, LMDEPLOY),
)


class Servers:
    """Starts each server when it is asked for, once. Raises ``Missing``."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self._urls: dict[str, str] = {}

    def url(self, name: str) -> str:
        if name not in self._urls:
            self._urls[name] = self._stack.enter_context(self._started(name))
        return self._urls[name]

    def _started(self, name: str) -> AbstractContextManager[str]:
        if name == "mistral.rs":
            return mistral_rs()
        if name == LMDEPLOY:
            return _lmdeploy(self._folder)
        bounds = ("image_min_tokens=40", "image_max_tokens=64") if name == BOUNDED else ()
        return llama_cpp(self._gguf, *bounds)

    @cached_property
    def _gguf(self) -> Path:
        return gguf_files(self._folder)


def accuracy(
    engines: Sequence[Engine],
    servers: Servers,
    drawings: int,
    few: int,
    known: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Rows in turn. few: drawings for LMDeploy on the host runtime, which is slow. known: rows of the
    reference engine that are not measured again."""
    have = {_key(row) for row in known}
    counts = {one.name: few if one.server == LMDEPLOY else drawings for one in engines}
    for count in sorted(set(counts.values()), reverse=True):
        if ("reference", count) in have:
            continue
        name = "reference" if count == drawings else f"reference, the first {count}"
        yield accuracy_row(name, asyncio.run(reference_score(count)))
    for one in engines:
        try:
            url = servers.url(one.server)
        except Missing as missing:
            print(f"without {one.name}: {missing}")
            continue
        score = remote_score(one.name, url, counts[one.name], one.prepare)
        yield accuracy_row(one.name, score)


def with_stored(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those of other servers that are stored in a file of results; of the reference engine,
    those with another number of drawings."""
    new = {_key(row) for row in rows}
    return [*(row for row in stored(name) if _key(row) not in new), *rows]


def stored(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return found


def _key(row: dict[str, Any]) -> tuple[str, int]:
    name = row.get("engine") or row["server"]
    return ("reference", row["drawings"]) if name.startswith("reference") else (name, 0)


NOTES_VALIDITY = """One answer to each of {schemas} schemas, \
at temperature {temperature:g}, at most {tokens} tokens, {callers} \
callers at a time; judged by jsonschema on JSON read strictly, none of our code. bare: the server itself, with \
`response_format`; "200, invalid" has finish reason `stop` and is not valid, so that its caller has to notice; \
"cut" has finish reason `length`; "server died": three times, of this schema; a supervisor starts it again. \
ours: through `qwen3vl serve --engine remote`, whose OK answers count. {versions}"""
NOTES_ACCURACY = """AnalyzeImage on held-out drawings \
through `qwen3vl serve --engine remote`, beside the reference engine; in per \
cent. Every engine decodes greedily from the same weights (float32; LMDeploy bfloat16). The model was trained \
on images of 40 to 64 tokens, to which its own processing resizes. llama.cpp resizes with bilinear \
interpolation, and unless told otherwise to 8 to 4096 tokens; "40 to 64 tokens": image_min_tokens and \
image_max_tokens; "resized before": the image was sent in the size of the model's own processing, so that the \
server has nothing to resize; "--remote-resize": our server does that. Rows can be of several runs (`--engines`); \
the environment is that of the last one. {versions}"""


def versions() -> str:
    from tests.model_servers.processes import version

    found = {name: version(name) for name in ("xllamacpp", "mistralrs")}
    return "; ".join(f"{name} {one}" for name, one in found.items() if one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few schemas and drawings")
    collection_argument(parser)
    parser.add_argument("--every", type=int, default=1, help="of so many schemas, ask one")
    parser.add_argument("--minutes", type=float, default=120.0, help="for each server, twice")
    parser.add_argument("--drawings", type=int, default=128)
    parser.add_argument("--only", choices=("validity", "accuracy"))
    parser.add_argument("--servers", nargs="+", metavar="NAME", help="only those rows of validity")
    parser.add_argument(
        "--engines", nargs="+", metavar="NAME", choices=[one.name for one in ENGINES],
        help="only those rows of accuracy; the others stay as they are stored, the reference too",
    )  # fmt: skip
    parser.add_argument(
        "--lmdeploy-drawings", type=int, default=LMDEPLOY_DRAWINGS, metavar="N",
        help="at most so many drawings for LMDeploy",
    )  # fmt: skip
    options = parser.parse_args()
    cases = read_collection(options.schemas) if options.only != "accuracy" else None
    every, drawings = (100, 8) if options.quick else (options.every, options.drawings)
    with ExitStack() as stack:
        servers = Servers(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        print(environment())
        if cases is not None:
            plain = {"a server that ignores schemas": stack.enter_context(ignoring())}
            for name in options.servers or (*plain, "llama.cpp", "mistral.rs"):
                try:
                    plain[name] = plain.get(name) or servers.url(name)
                except Missing as missing:
                    print(f"without {name}: {missing}")
            wanted = {name: plain[name] for name in options.servers or plain if name in plain}
            rows = validity(wanted, cases[::every], options.minutes)
            notes = NOTES_VALIDITY.format(
                schemas=len(cases[::every]), temperature=TEMPERATURE, tokens=MAX_TOKENS,
                callers=CALLERS, versions=versions(),
            )  # fmt: skip
            if options.servers:
                rows = with_stored("remote_validity", rows)
            write_results("remote_validity", rows, notes)
            print(markdown([{k: v for k, v in row.items() if k != "reasons"} for row in rows]))
        if options.only != "validity":
            engines = [one for one in ENGINES if one.name in (options.engines or (one.name,))]
            few = min(drawings, options.lmdeploy_drawings)
            notes = NOTES_ACCURACY.format(versions=versions())
            rows = []
            known = stored("remote_accuracy") if options.engines else ()
            for row in accuracy(engines, servers, drawings, few, known):
                rows.append(row)
                print(row, flush=True)
                shown = with_stored("remote_accuracy", rows) if options.engines else rows
                write_results("remote_accuracy", shown, notes)
            print(markdown(rows))


@contextmanager
def _lmdeploy(folder: Path) -> Iterator[str]:
    """``lmdeploy serve api_server`` on the host runtime, with our extension."""
    variables = {"LMDEPLOY_QWEN3VL": "1"}
    with lmdeploy(
        BUNDLED_MODEL, folder, "--model-name", "drawings", "--session-len", "1024", mode="numbers",
        extra=variables,
    ) as running:  # fmt: skip
        yield running.url


if __name__ == "__main__":
    main()
