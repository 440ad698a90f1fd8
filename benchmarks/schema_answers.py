"""Random answers under many schemas, through a real server: does any OK answer not validate?

``python -m benchmarks schema_answers [--schemas FILE.jsonl]``; ``python -m benchmarks.schema_answers --http``
asks over HTTP, as OpenAI's SDKs do, and writes ``schema_answers_http``. A server in a process of its own, the
reference engine on the bundled model; each schema is asked once at each temperature without a
image. High ones give text that means nothing and tries everything that the grammar lets through,
lower ones other text, with more of what the model has learnt. Each OK answer is
judged by jsonschema alone, with none of our code: read strictly, then validated against the schema as
it was sent. That happens in a process that is killed where a regular expression does not end.

Without a file there is nothing to measure and nothing is written.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import psutil

from benchmarks.collection import Case, collection_argument, read_collection
from benchmarks.common import environment, markdown, write_results
from benchmarks.judge import Judge
from benchmarks.mask_engines import LARGE_LIMITS, schema_text
from service.client import CHANNEL_OPTIONS, read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub

ROOT = Path(__file__).parents[1]
ERRORS = ROOT / "docs" / "errors.md"
PROMPT = "Answer with anything that fits."
TEMPERATURES = (2.0, 1.5, 1.0)
MAX_TOKENS = 192
CALL_LIMIT_S = 120.0
START_LIMIT_S = 120.0
QUICK_SCHEMAS = 8
ADMISSION = ("SCHEMA_", "GRAMMAR_")
"""How the reasons of refusals before generation begin."""
SERVING = re.compile(r"^SERVING on port (\d+)(?:, (http://[\d.]+:\d+))?", re.MULTILINE)
ENFORCEMENTS = {"enforced": pb.ENFORCEMENT_ENFORCED, "checked": pb.ENFORCEMENT_CHECKED}
MIB = 1 << 20


def documented() -> frozenset[str]:
    """The reasons that docs/errors.md lists."""
    return frozenset(re.findall(r"^\| `([A-Z_]+)` \|", ERRORS.read_text(), re.MULTILINE))


@dataclass(frozen=True)
class Call:
    """What came of one call. reason: OK, or that of the error; empty where the error has none.
    verdict: of the judge on an OK answer. text: the answer."""

    number: int
    reason: str
    seconds: float
    verdict: str = ""
    text: str = ""
    message: str = ""
    enforcement: int = 0
    attempts: int = 1
    temperature: float = 0.0


@contextmanager
def server(*words: str) -> Iterator[tuple[psutil.Popen, str]]:
    """``qwen3vl serve`` on the bundled model, and its address, where it serves: the URL of HTTP, where it
    has a port for it.

    words: more settings.
    """
    with addressed_server(*words) as (process, address, url):
        yield process, url or address


@contextmanager
def addressed_server(*words: str) -> Iterator[tuple[psutil.Popen, str, str | None]]:
    """The same with its address over gRPC, and the URL of HTTP or None."""
    with tempfile.NamedTemporaryFile("r") as log:
        command = [sys.executable, "-m", "service", "serve", "--port", "0",
                   "--max-schema-bytes", str(LARGE_LIMITS.max_bytes),
                   "--max-regex-length", str(LARGE_LIMITS.max_regex_length), *words]  # fmt: skip
        with open(log.name, "w") as stderr:
            process = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield process, *_addresses(process, Path(log.name))
        finally:
            process.terminate()
            process.wait(60)


def _addresses(process: psutil.Popen, log: Path) -> tuple[str, str | None]:
    """The address over gRPC and the URL of HTTP, once the server serves."""
    deadline = time.monotonic() + START_LIMIT_S
    while (found := SERVING.search(log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"The server did not start:\n{log.read_text()}")
        time.sleep(0.1)
    return f"localhost:{found[1]}", found[2]


def memory_mib(process: psutil.Popen) -> float:
    """Resident memory of a server and the processes that it has started."""
    return float(sum(one.memory_info().rss for one in (process, *process.children(True))) / MIB)


async def ask(
    address: str,
    cases: Sequence[Case],
    temperatures: Sequence[float],
    max_tokens: int,
    callers: int,
    minutes: float,
) -> list[Call]:
    """All calls, this many at a time: every schema once in an order of no meaning, then again at
    the next temperature.

    minutes: no call begins later than that.
    """
    numbers = random.Random(0).sample(range(len(cases)), len(cases))
    plan = [(number, seed) for seed in range(len(temperatures)) for number in numbers]
    began = time.monotonic()
    deadline = began + 60 * minutes
    pending = iter(plan)
    found: list[Call] = []
    judge = Judge()
    async with caller_of(address) as ask_one:

        async def caller() -> None:
            for number, seed in pending:
                if time.monotonic() > deadline:
                    return
                options = pb.SamplingOptions(
                    temperature=temperatures[seed], seed=1000 * seed + number, max_tokens=max_tokens
                )
                call = await ask_one(number, cases[number], options)
                if call.reason == "OK":
                    verdict = await judge.verdict(schema_text(cases[number].schema), call.text)
                    call = Call(**{**vars(call), "verdict": verdict})
                found.append(call)
                if len(found) % 200 == 0:
                    minutes_so_far = (time.monotonic() - began) / 60
                    answered = sum(call.reason == "OK" for call in found)
                    wrong = sum(call.verdict == "invalid" for call in found)
                    print(f"{len(found)} of {len(plan)} calls in {minutes_so_far:.1f} minutes: "
                          f"{answered} OK, {wrong} of them invalid", flush=True)  # fmt: skip

        await asyncio.gather(*(caller() for _ in range(callers)))
    await judge.close()
    return found


Ask = Callable[[int, Case, pb.SamplingOptions], Awaitable[Call]]


@asynccontextmanager
async def caller_of(address: str) -> AsyncIterator[Ask]:
    """What asks one question, over gRPC or over HTTP."""
    if address.startswith("http"):
        async with aiohttp.ClientSession(address, trust_env=False) as session:
            async with session.get("/v1/models") as response:
                model = (await response.json())["data"][0]["id"]
            yield functools.partial(_post, session, model)
        return
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        yield functools.partial(_call, VisionServiceStub(channel))


async def _post(
    session: aiohttp.ClientSession,
    model: str,
    number: int,
    case: Case,
    sampling: pb.SamplingOptions,
) -> Call:
    """Over HTTP, as ``response_format`` of a chat completion."""
    temperature = round(sampling.temperature, 6)
    head = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": temperature,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
    }
    form = '{"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}'
    form = form.replace("SCHEMA", schema_text(case.schema))  # as it is written, with its numbers
    body = f'{json.dumps(head)[:-1]}, "response_format": {form}}}'
    began = time.perf_counter()
    limit = aiohttp.ClientTimeout(CALL_LIMIT_S)
    async with session.post(
        "/v1/chat/completions",
        data=body.encode(),
        headers={"content-type": "application/json"},
        timeout=limit,
    ) as response:
        reply = json.loads(await response.read())
    seconds = time.perf_counter() - began
    if response.status != 200:
        error = reply["error"]
        return Call(
            number, error["code"], seconds, message=f"{response.status}: {error['message']}",
            temperature=temperature,
        )  # fmt: skip
    choice, report = reply["choices"][0], reply["structured_output"]
    return Call(
        number, "OK", seconds, text=choice["message"]["content"],
        enforcement=ENFORCEMENTS.get(report["enforcement"], pb.ENFORCEMENT_UNSPECIFIED),
        attempts=report["attempts"], temperature=temperature,
    )  # fmt: skip


async def _call(stub: Any, number: int, case: Case, sampling: pb.SamplingOptions) -> Call:
    """Over gRPC."""
    grammar = pb.Grammar(json_schema=schema_text(case.schema))
    task = pb.Task(inline=pb.InlineTask(user=PROMPT, grammar=grammar))
    request = pb.RunTaskRequest(task=task, sampling=sampling)
    began = time.perf_counter()
    temperature = round(sampling.temperature, 6)
    try:
        response = await stub.RunTask(request, timeout=CALL_LIMIT_S)
    except grpc.aio.AioRpcError as error:
        read = read_error(error)
        seconds = time.perf_counter() - began
        return Call(
            number, read.reason, seconds, message=f"{read.code.name}: {read.message}",
            temperature=temperature,
        )  # fmt: skip
    result = response.result
    seconds = time.perf_counter() - began
    return Call(
        number, "OK", seconds, text=result.json, enforcement=result.enforcement,
        attempts=result.attempts, temperature=temperature,
    )  # fmt: skip


def table(cases: Sequence[Case], calls: Sequence[Call]) -> list[dict[str, Any]]:
    """A line for each temperature, and one for all calls."""
    groups: dict[str, list[Call]] = {}
    for call in calls:
        groups.setdefault(f"{call.temperature:g}", []).append(call)
    if len(groups) > 1:
        groups["all"] = list(calls)
    return [{"temperature": name} | row(cases, some) for name, some in groups.items()]


def row(cases: Sequence[Case], calls: Sequence[Call]) -> dict[str, Any]:
    """What came of some calls."""
    reasons = Counter(call.reason for call in calls)
    verdicts = Counter(call.verdict for call in calls if call.reason == "OK")
    known = documented() | {"OK"}
    asked = {call.number for call in calls}
    refused = {call.number for call in calls if call.reason.startswith(ADMISSION)}
    answered = {call.number for call in calls if call.reason == "OK"}
    milliseconds = [1e3 * call.seconds for call in calls]
    lengths = [len(call.text) for call in calls if call.reason == "OK"]
    shown = ("OK", "OUTPUT_TRUNCATED", "OUTPUT_INVALID")
    return {
        "collection": len(cases),
        "schemas": len(asked - refused),
        "schemas with an OK answer": len(answered),
        "calls": len(calls),
        "OK": reasons["OK"],
        "OK, ENFORCED": sum(call.enforcement == pb.ENFORCEMENT_ENFORCED for call in calls),
        "OK, median characters": float(np.median(lengths)) if lengths else 0.0,
        "OK, invalid": verdicts["invalid"],
        "OK, not judged": verdicts["unknown"],
        "second attempts": sum(call.attempts > 1 for call in calls),
        "truncated": reasons["OUTPUT_TRUNCATED"],
        "OUTPUT_INVALID": reasons["OUTPUT_INVALID"],
        "refused": sum(n for reason, n in reasons.items() if reason.startswith(ADMISSION)),
        "other": sum(
            n for reason, n in reasons.items()
            if reason not in shown and not reason.startswith(ADMISSION)
        ),
        "undocumented": sum(n for reason, n in reasons.items() if reason not in known),
        "call p50 ms": float(np.percentile(milliseconds, 50)),
        "call p99 ms": float(np.percentile(milliseconds, 99)),
        "reasons": reasons,
    }  # fmt: skip


def write_details(path: Path, cases: Sequence[Case], calls: Sequence[Call]) -> None:
    """Every call that somebody should look at, as lines of JSON."""
    with path.open("w") as out:
        for call in calls:
            if call.reason not in ("OK", "OUTPUT_TRUNCATED") or call.verdict in (
                "invalid",
                "unknown",
            ):
                out.write(json.dumps({"name": cases[call.number].name, **vars(call)}) + "\n")


NOTES = """`qwen3vl serve` with the reference engine on the bundled model; an answer to each schema at each \
temperature with a seed, at most {max_tokens} tokens, {callers} callers at a time{over}, no image; max_schema_bytes \
{bytes}, max_regex_length {regex}; {minutes_taken:.0f} minutes. schemas: those that were not refused before \
generation. OK answers are judged by jsonschema's own validator for the draft that the schema names, on JSON read \
strictly (no duplicate keys, no NaN, exact decimals), none of our code; not judged: it cannot, because Python's \
regular expressions do not know the pattern or do not end. truncated: OUTPUT_TRUNCATED, an answer that was longer \
than the limit, which proves nothing: objects that are open for further names, and lists without an end, are hardly \
ever ended by random text, at any of the temperatures and limits that were tried. refused: reasons that begin with \
SCHEMA_ or GRAMMAR_. undocumented: no reason of docs/errors.md. \
The server lived to the end with {memory:.0f} MiB, the processes that \
compile grammars included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few schemas, to see that it runs")
    collection_argument(parser)
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=TEMPERATURES, metavar="T",
        help="an answer to each schema at each of them",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=120.0, help="begin no call later")
    parser.add_argument("--every", type=int, default=1, help="of so many schemas, ask one")
    parser.add_argument("--http", action="store_true", help="ask over HTTP instead of gRPC")
    parser.add_argument("--details", type=Path, metavar="FILE.jsonl", help="calls to look at")
    options = parser.parse_args()
    cases = read_collection(options.schemas)
    if cases is None:
        return
    if options.quick:
        options.every = max(1, len(cases) // QUICK_SCHEMAS)
    cases = cases[:: options.every]
    began = time.monotonic()
    with server(*(["--http-port", "0"] if options.http else [])) as (process, address):
        calls = asyncio.run(
            ask(
                address,
                cases,
                options.temperatures,
                options.max_tokens,
                options.callers,
                options.minutes,
            )
        )
        memory = memory_mib(process)
    if options.details:
        write_details(options.details, cases, calls)
    found = table(cases, calls)
    notes = NOTES.format(
        memory=memory, bytes=LARGE_LIMITS.max_bytes, regex=LARGE_LIMITS.max_regex_length,
        minutes_taken=(time.monotonic() - began) / 60,
        over=" over HTTP" if options.http else "", **vars(options),
    )  # fmt: skip
    write_results("schema_answers_http" if options.http else "schema_answers", found, notes)
    print(environment())
    print(markdown([{k: v for k, v in line.items() if k != "reasons"} for line in found]))
    for line in found:
        print(line["temperature"], dict(line["reasons"]))


if __name__ == "__main__":
    main()
