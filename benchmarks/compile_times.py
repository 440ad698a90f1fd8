"""Times of one engine to compile schemas, in a process that ends where a schema takes too long.

For `benchmarks.large_vocabulary`: some schemas take minutes over the tokens of a published checkpoint, and
a compilation in C++ cannot be interrupted. The processor time of each schema is limited, not its duration, so
that a busy machine counts the same schemas.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import xgrammar

from benchmarks.mask_engines import LARGE_LIMITS, schema_text
from benchmarks.vocabulary import BYTES, END, qwen_tokens
from service.errors import GrammarError
from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.structured_output.worker import collect
from service.types import Grammar, GrammarKind

THREADS = 1
OURS, PEER = "ours", "xgrammar"
Compile = Callable[[str], Any]
"""Compiles the text of a schema. Raises GrammarError or RuntimeError for one that is refused."""


def tokens(vocabulary: str) -> xgrammar.TokenizerInfo:
    """The tokens of Qwen, or the bytes and an end. Raises FileNotFoundError without the package."""
    if vocabulary == BYTES:
        table, end = [bytes([value]) for value in range(256)] + [b""], 256
    else:
        found = qwen_tokens()
        if found is None:
            raise FileNotFoundError("the tokens of Qwen")
        table, end = found, END
    return xgrammar.TokenizerInfo(
        table, vocab_type=xgrammar.VocabType.RAW, vocab_size=len(table), stop_token_ids=[end]
    )


def engines(
    info: xgrammar.TokenizerInfo, limits: SchemaLimits = DEFAULT_LIMITS
) -> dict[str, Compile]:
    """How each compiles a schema; nothing is kept from one to the next but what every schema shares."""

    def compiler() -> Any:
        return xgrammar.GrammarCompiler(info, max_threads=THREADS, cache_enabled=False)

    def theirs(source: str) -> Any:
        return compiler().compile_json_schema(source, any_whitespace=False, strict_mode=False)

    def ours(source: str) -> Any:
        found = analyse(Grammar(GrammarKind.JSON_SCHEMA, source, lengths_beside=True), limits)
        return compiler().compile_grammar(found.grammar.ebnf)

    return {PEER: theirs, OURS: ours}


def compiled_in(compile_: Compile, schema: Any) -> tuple[Any, float]:
    """A compiled grammar, and the seconds of processor time for it, all of which this thread spends.

    The clock of the process is of no use here: while `Child` limits it, Linux renews it every few
    milliseconds only.
    """
    source = schema_text(schema)
    begun = time.thread_time()
    compiled = compile_(source)
    return compiled, time.thread_time() - begun


class Child:
    """Compiles schemas with large limits in a process of its own.

    engine: OURS or PEER. vocabulary: QWEN or BYTES. limit_s: processor time of a schema at most.
    """

    def __init__(self, engine: str, vocabulary: str, limit_s: float) -> None:
        self._arguments = engine, vocabulary, limit_s
        self._limit_s = limit_s
        self._start()

    def seconds(self, schema: Any) -> float | None:
        """Processor time for a schema; at most the limit. None: it is refused."""
        try:
            self._pipe.send(schema)
            found: float | None = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            if self._process.exitcode != -signal.SIGPROF:
                code = self._process.exitcode
                what = f"the compiler ended with {code} on {json.dumps(schema)[:500]}"
                raise RuntimeError(what) from None
            self._start()
            return self._limit_s
        return found if found is None else min(found, self._limit_s)

    def close(self) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, *self._arguments), daemon=True)
        self._process.start()
        end.close()
        self._pipe.recv()


def _serve(pipe: Connection, engine: str, vocabulary: str, limit_s: float) -> None:
    compile_ = engines(tokens(vocabulary), LARGE_LIMITS)[engine]
    compiled_in(compile_, True)  # what is loaded and built once
    gc.freeze()  # as the processes of the service do, which analyse
    gc.disable()
    pipe.send("ready")
    for answered in range(1 << 30):
        schema = pipe.recv()
        signal.setitimer(signal.ITIMER_PROF, limit_s)  # ends the process
        try:
            found = compiled_in(compile_, schema)[1]
        except (GrammarError, RuntimeError):
            found = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        collect(answered)
        pipe.send(found)
