"""Schemas made by chance, and grammars made to do harm, against a server that others use meanwhile.

``python -m benchmarks fuzzed_schemas``. ``qwen3vl serve`` on the bundled model in a process of its own;
schemas that are mutated, or made from nothing, then every hostile grammar of the tests. Each is asked
for an answer at temperature 1.5. A prober calls with ordinary tasks all the while: how long it waits is
what the others pay. Each OK answer is judged as in ``schema_answers``.

The exit code is 1 where the server ended, stood still, gave a reason that is not documented, or an
invalid answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import socket
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import psutil

from benchmarks.collection import collection_argument, read_collection
from benchmarks.common import environment, markdown, write_results
from benchmarks.judge import Judge
from benchmarks.schema_answers import ADMISSION, documented, memory_mib, server
from service.client import CHANNEL_OPTIONS, read_error
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.pb.qwen3vl.v1.vision_pb2_grpc import VisionServiceStub
from service.types import Grammar, GrammarKind
from tests.service.schema_compiler.fuzzed import fuzzed
from tests.service.schema_compiler.hostile import HOSTILE

FUZZED = 2000
QUICK = 20
MAX_TOKENS = 64
CALLERS = 4
CALL_LIMIT_S = 120.0
STALL_S = 10.0
"""A prober that waits so long has met a server that stands still."""
PROBE_PAUSE_S = 0.1
PROBE = '{"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, ' \
        '"required": ["a"], "additionalProperties": false}'  # fmt: skip
SETTLED = 0.25
"""The part of the calls after which caches are warm, and memory is looked at for the first time."""
SEEDS: tuple[Any, ...] = tuple(
    json.loads(one.grammar.source)
    for one in HOSTILE
    if one.grammar.kind is GrammarKind.JSON_SCHEMA and one.grammar.source.startswith('{"')
    and len(one.grammar.source) < 2000 and "twice" not in one.name and "NaN" not in one.name
    and "behind" not in one.name
)  # fmt: skip
"""What is mutated where there is no collection."""


@dataclass
class Found:
    """What came of the calls."""

    reasons: Counter[str] = field(default_factory=Counter)
    invalid: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def wrong(self) -> list[str]:
        """What must not be."""
        known = documented() | {"OK"}
        found = [
            f"the reason {one!r} is not documented" for one in self.reasons if one not in known
        ]
        found += [f"an answer that does not validate: {one}" for one in self.invalid]
        slow = sum(one > STALL_S for one in self.probes)
        found += [f"{slow} ordinary calls took more than {STALL_S:g} s"] if slow else []
        return found


def message(grammar: Grammar) -> pb.Grammar:
    """A grammar as a message; half surrogates, which it cannot hold, as question marks."""
    if grammar.kind is GrammarKind.CHOICE:
        options = [one.encode("utf-8", "replace").decode() for one in json.loads(grammar.source)]
        return pb.Grammar(choice=pb.Choice(options=options))
    return pb.Grammar(**{grammar.kind.value: grammar.source.encode("utf-8", "replace").decode()})


async def attack(
    address: str, process: psutil.Popen, grammars: Sequence[Grammar], callers: int = CALLERS
) -> Found:
    """Ask for an answer under each grammar, this many at a time, with a prober beside."""
    found = Found()
    judge = Judge()
    pending = iter(enumerate(grammars))
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = VisionServiceStub(channel)

        async def caller() -> None:
            for number, grammar in pending:
                began = time.perf_counter()
                reason, text = await _outcome(stub, message(grammar), number)
                found.seconds.append(time.perf_counter() - began)
                found.reasons[reason] += 1
                is_json = reason == "OK" and grammar.kind is GrammarKind.JSON_SCHEMA
                if is_json and await judge.verdict(grammar.source, text) == "invalid":
                    found.invalid.append(f"{text} for {grammar.source}")
                if process.poll() is not None:
                    raise RuntimeError(f"The server ended at {grammar.source[:2000]}")
                if number + 1 in (int(len(grammars) * SETTLED), len(grammars)):
                    found.memory.append(memory_mib(process))
                if (number + 1) % 200 == 0:
                    print(f"{number + 1} of {len(grammars)}: {dict(found.reasons)}, "
                          f"{memory_mib(process):.0f} MiB", flush=True)  # fmt: skip

        async def prober() -> None:
            grammar = pb.Grammar(json_schema=PROBE)
            while True:
                began = time.perf_counter()
                reason, text = await _outcome(stub, grammar, len(found.probes))
                found.probes.append(time.perf_counter() - began)
                if reason != "OK" or set(json.loads(text)) != {"a"}:
                    raise RuntimeError(f"An ordinary call ended with {reason} {text}")
                await asyncio.sleep(PROBE_PAUSE_S)

        beside = asyncio.ensure_future(prober())
        everyone = asyncio.gather(*(caller() for _ in range(callers)))
        await asyncio.wait((beside, everyone), return_when=asyncio.FIRST_COMPLETED)
        if beside.done():
            everyone.cancel()
            beside.result()
        beside.cancel()
        await everyone
    await judge.close()
    return found


async def _outcome(stub: Any, grammar: pb.Grammar, seed: int) -> tuple[str, str]:
    """OK or the reason of the error, and the answer."""
    sampling = pb.SamplingOptions(temperature=1.5, seed=seed, max_tokens=MAX_TOKENS)
    task = pb.Task(inline=pb.InlineTask(user="Answer with anything that fits.", grammar=grammar))
    request = pb.RunTaskRequest(task=task, sampling=sampling)
    try:
        result = (await stub.RunTask(request, timeout=CALL_LIMIT_S)).result
    except grpc.aio.AioRpcError as error:
        read = read_error(error)
        return read.reason or read.code.name, read.message
    return "OK", result.json or result.text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def replaced(port: int) -> dict[str, int]:
    """Worker processes that the server has replaced, by why."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = re.findall(r'^qwen3vl_grammar_worker_restarts_total{reason="(\w+)"} (\S+)$', text, re.M)
    return {reason: int(float(count)) for reason, count in found}


def row(name: str, found: Found, workers: dict[str, int]) -> dict[str, Any]:
    """A line of the table."""
    refused = sum(n for reason, n in found.reasons.items() if reason.startswith(ADMISSION))
    milliseconds = [1e3 * one for one in found.probes]
    first, last = found.memory[0], found.memory[-1]
    return {
        "grammars": name,
        "calls": sum(found.reasons.values()),
        "OK": found.reasons["OK"],
        "OK, invalid": len(found.invalid),
        "truncated": found.reasons["OUTPUT_TRUNCATED"],
        "OUTPUT_INVALID": found.reasons["OUTPUT_INVALID"],
        "refused": refused,
        "undocumented": sum(n for r, n in found.reasons.items() if r not in documented() | {"OK"}),
        "workers replaced": ", ".join(f"{n} {why}" for why, n in sorted(workers.items())) or "0",
        "slowest call s": max(found.seconds),
        "ordinary calls beside": len(found.probes),
        "their p50 ms": float(np.percentile(milliseconds, 50)),
        "their p99 ms": float(np.percentile(milliseconds, 99)),
        "their slowest ms": max(milliseconds),
        "stalls": sum(one > STALL_S for one in found.probes),
        "MiB when warm": first,
        "MiB at the end": last,
        "reasons": found.reasons,
    }


NOTES = """`qwen3vl serve` with the reference engine on the bundled model, {callers} callers at a time, temperature \
1.5, at most {max_tokens} tokens; max_schema_bytes and max_regex_length as in schema_answers. Fuzzed: {seeds} schemas \
mutated by chance, every tenth made from nothing; three of four are tried until they are valid schemas, the others may \
be no schemas or no JSON any more. Hostile: those of the tests, written by hand. OK answers to schemas are judged by \
jsonschema alone. Ordinary calls with a small schema follow one another all the while, {pause:g} s between them: \
stalls are those over {stall:g} s. Memory is that of the server with its worker processes, after a quarter of the \
calls and after the last. The server lived to the end. refused: reasons that begin with SCHEMA_ or GRAMMAR_; \
undocumented: no reason of docs/errors.md."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few schemas, to see that it runs")
    collection_argument(parser)
    parser.add_argument("--count", type=int, default=FUZZED, help="fuzzed schemas")
    parser.add_argument("--seed", type=int, default=0, help="of the chance that makes them")
    options = parser.parse_args()
    every = max(1, len(HOSTILE) // QUICK) if options.quick else 1
    count = QUICK if options.quick else options.count
    collection = read_collection(options.schemas)
    seeds = SEEDS if collection is None else [one.schema for one in collection]
    schemas = [
        Grammar(GrammarKind.JSON_SCHEMA, text) for text in fuzzed(seeds, count, options.seed)
    ]
    hostile = [one.grammar for one in HOSTILE[::every]]
    rows, wrong = [], []
    for name, grammars in ((f"{count} fuzzed", schemas), (f"{len(hostile)} hostile", hostile)):
        port = free_port()
        with server("--admin-port", str(port)) as (process, address):
            found = asyncio.run(attack(address, process, grammars))
            rows.append(row(name, found, replaced(port)))
        wrong += found.wrong()
    notes = NOTES.format(
        callers=CALLERS, max_tokens=MAX_TOKENS, pause=PROBE_PAUSE_S, stall=STALL_S, seeds=len(seeds)
    )
    write_results("fuzzed_schemas", rows, notes)
    print(environment())
    print(markdown([{k: v for k, v in line.items() if k != "reasons"} for line in rows]))
    for line in rows:
        print(line["grammars"], dict(line["reasons"]))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
