"""Grammars analysed and compiled in a process of its own, which may crash, hang or be killed.

As a program it answers lines ``[kind, source, max_bytes, walks]`` on standard input with what came of
it. The engine's compiler gets a vocabulary of bytes. With walks it writes so many random texts of
the grammar and holds them to what the analysis promises.
"""

from __future__ import annotations

import json
import queue
import random
import resource
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.types import Grammar, GrammarKind

ROOT = Path(__file__).parents[3]
MEMORY_BYTES = 6 << 30
START_LIMIT_S = 120.0
END = 256
WALK_BYTES = 1500


@dataclass
class Outcome:
    """what: enforced, checked or refused. reason: of a refusal. fields: that it names.

    seconds: until there was a grammar. analysis_s: the part of it that is ours.
    texts: how many random texts came to an end. wrong: texts that break a promise, with why.
    peak_mib: most memory of the process so far.
    """

    what: str
    seconds: float
    analysis_s: float = 0.0
    reason: str = ""
    message: str = ""
    fields: list[str] = field(default_factory=list)
    ebnf_bytes: int = 0
    texts: int = 0
    wrong: list[list[str]] = field(default_factory=list)
    peak_mib: float = 0.0


class Died(Exception):
    """The process crashed or had to be killed; the message says which, with its last words."""


class Child:
    """The process, and a new one when it is gone."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def outcome(
        self,
        grammar: Grammar,
        limit_s: float,
        limits: SchemaLimits = DEFAULT_LIMITS,
        walks: int = 0,
    ) -> Outcome:
        """Raises Died after the limit, or when the process ends."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        line = json.dumps([grammar.kind.value, grammar.source, limits.max_bytes, walks])
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return Outcome(**self._read(limit_s))
        except (queue.Empty, BrokenPipeError) as error:
            self.close()
            what = "hangs" if isinstance(error, queue.Empty) else "crashes"
            raise Died(f"{what}: {''.join(self._last_words).strip()}") from None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.structured_output.child"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._last_words: deque[str] = deque(maxlen=3)
        out, words = (self._process.stdout, self._lines), (self._process.stderr, self._last_words)
        threading.Thread(target=_forward, args=out, daemon=True).start()
        threading.Thread(target=_keep_last, args=words, daemon=True).start()
        if self._read(START_LIMIT_S) != "ready":
            raise Died("did not start")

    def _read(self, limit_s: float) -> Any:
        line = self._lines.get(timeout=limit_s)
        if line is None:
            raise BrokenPipeError
        return json.loads(line)


def _forward(out: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in out:
        if line.startswith("@"):
            lines.put(line[1:])
    lines.put(None)


def _keep_last(lines: Iterable[str], last: deque[str]) -> None:
    last.extend(lines)


# In the process


def walk(automaton: Any, rng: random.Random) -> bytes | None:
    """A random text of the grammar; None where it does not end soon.

    Bytes that close something are preferred more and more, so that most texts end.
    """
    import xgrammar

    matcher = xgrammar.GrammarMatcher(automaton)
    mask = xgrammar.allocate_token_bitmask(1, END + 1)
    words = mask.numpy()[0]
    text = bytearray()
    for place in range(WALK_BYTES):
        matcher.fill_next_token_bitmask(mask)
        allowed = [t for t in range(END + 1) if words[t // 32] >> (t % 32) & 1]
        closing = [t for t in allowed if t == END or t in b'"}]']
        hurry = min(0.9, 0.2 + place / 300)
        token = rng.choice(closing if closing and rng.random() < hurry else allowed)
        if token == END:
            return bytes(text)
        matcher.accept_token(token)
        text.append(token)
    return None


def broken(grammar: Grammar, limits: SchemaLimits, enforced: bool, text: bytes) -> str:
    """What a text of the grammar breaks; empty where nothing is broken.

    An enforced grammar is never wrong; any grammar of a schema writes JSON, though perhaps with a
    name twice.
    """
    from service.errors import OutputInvalid
    from service.schema_compiler.grammar_checks import check_answer
    from service.structured_output.answers import AnswerValidator

    if grammar.kind is not GrammarKind.JSON_SCHEMA:
        try:
            check_answer(grammar, text.decode())
        except (OutputInvalid, UnicodeDecodeError) as error:
            return f"{error}" if enforced else ""
        return ""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    try:
        AnswerValidator(grammar.source, limits).parse(text.decode())
    except OutputInvalid as error:
        return f"{error}" if enforced else ""
    return ""


def tried(compiler: Any, grammar: Grammar, limits: SchemaLimits, walks: int) -> Outcome:
    from service.errors import GrammarError
    from service.schema_compiler.api import analyse
    from service.schema_compiler.report import Enforcement

    began, analysis_s = time.perf_counter(), 0.0
    try:
        analysed = analyse(grammar, limits)
        analysis_s = time.perf_counter() - began
        compiled = compiler.compile(analysed.grammar)
    except GrammarError as error:
        seconds = time.perf_counter() - began
        fields = [one.field for one in error.violations]
        return Outcome(
            "refused", seconds, analysis_s or seconds, error.reason, error.message[:500], fields
        )
    enforced = analysed.report.enforcement is Enforcement.ENFORCED
    found = Outcome(
        "enforced" if enforced else "checked", time.perf_counter() - began, analysis_s,
        ebnf_bytes=len(analysed.grammar.ebnf.encode()),
    )  # fmt: skip
    rng = random.Random(grammar.source)
    for _ in range(walks):
        text = walk(compiled.automaton, rng)
        if text is not None:
            found.texts += 1
            why = broken(grammar, limits, enforced, text)
            if why:
                found.wrong.append([text.decode(errors="replace"), why])
    return found


def main() -> None:
    from service.engines.common.grammar import GrammarCompiler

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compiler = GrammarCompiler([bytes([value]) for value in range(END)] + [b""], [END])
    print("@" + json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, source, max_bytes, walks = json.loads(line)
        grammar = Grammar(GrammarKind(kind), source)
        outcome = tried(compiler, grammar, SchemaLimits(max_bytes=max_bytes), walks)
        outcome.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("@" + json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
