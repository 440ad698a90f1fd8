"""Tries out grammars in a process that may crash or be killed: ``python -m
lmdeploy_ext.grammars.worker SECONDS``.

Each line of stdin is a request: the kind and the text of a grammar, as JSON. Each line of stdout is
the answer: null, or a reason and a description, as JSON. The first line of stdout says that the
process is ready. The system ends the process after SECONDS of processor time for a grammar; it ends
by itself with its stdin.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any

MEMORY_BYTES = 2 << 30
"""Maximum address space, in bytes."""
MAX_BYTES = 16 << 20
"""Maximum memory of a grammar that is compiled over single bytes. Over a real vocabulary, the
compiled grammar takes several times as much."""
PLAIN = "--plain"
UNSUPPORTED, INVALID, COSTLY = "SCHEMA_UNSUPPORTED", "GRAMMAR_INVALID", "GRAMMAR_TOO_COSTLY"
READY = "ready"
_STOP = 256
_SHOWN = 300
_PLACE = re.compile(r"^\[[^\]]*\]\s*\S*\.(?:cc|h|cpp):\d+:\s*")
_WARNING = "Warning: "
_HARMLESS = re.compile(r"is not recognized\. The character itself will be matched")
"""A warning with which a grammar still matches what its author meant."""

Problem = tuple[str, str]
"""A reason and a description."""


class Tester:
    """Compiles grammars over a vocabulary of single bytes, as TurboMind compiles them over its own.

    Args:
        xgrammar: the module.
        errors: what the process writes to its stderr, where xgrammar says what it ignores.
    """

    def __init__(self, xgrammar: Any, errors: IO[str]) -> None:
        import numpy as np

        table = [*(bytes([value]) for value in range(256)), b""]
        kinds = xgrammar.VocabType
        info = xgrammar.TokenizerInfo(table, kinds.RAW, vocab_size=257, stop_token_ids=[_STOP])
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._compile: dict[str, Callable[[str], Any]] = {
            "json_schema": compiler.compile_json_schema,
            "regex_schema": compiler.compile_regex,
            "structural_tag": compiler.compile_structural_tag,
        }
        self._matcher = xgrammar.GrammarMatcher
        self._bits = np.zeros((1, 9), dtype=np.int32)
        self._errors = errors

    def problem(self, kind: str, source: str) -> Problem | None:
        """Why a grammar cannot be used; None if it can."""
        self._errors.seek(0)
        self._errors.truncate()
        try:
            compiled = self._compile[kind](source)
        except MemoryError:
            return COSTLY, "takes too much memory to compile; make it smaller"
        except Exception as error:  # of several types, also of its binding
            if "bad_alloc" in str(error):
                return COSTLY, "takes too much memory to compile; make it smaller"
            reason = UNSUPPORTED if kind == "json_schema" else INVALID
            return reason, f"cannot be compiled: {_plain(str(error))}"
        ignored = next(self._warnings(), None)
        if ignored is not None:
            reason = UNSUPPORTED if kind == "json_schema" else INVALID
            return reason, f"would not be enforced as it is: {ignored}"
        size = compiled.memory_size_bytes
        if size > MAX_BYTES:
            return COSTLY, f"takes {size} bytes when compiled, at most {MAX_BYTES} are allowed"
        self._matcher(compiled).fill_next_token_bitmask(self._bits)
        return None if self._bits.any() else (INVALID, "matches no text")

    def _warnings(self) -> Iterator[str]:
        self._errors.seek(0)
        for line in self._errors:
            _, found, text = line.partition(_WARNING)
            if found and not _HARMLESS.search(text):
                yield _plain(text)


def _plain(text: str) -> str:
    """A message of xgrammar without the address in its source tree."""
    return _PLACE.sub("", text.strip()).split("\n")[0][:_SHOWN]


def main(arguments: list[str]) -> None:
    """Answer requests until stdin ends."""
    seconds = int(arguments[0])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # LMDeploy handles Ctrl-C and closes our stdin
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile("w+") as errors:
        tester = Tester(_xgrammar(), errors)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
        for target in (1, 2):
            os.dup2(errors.fileno(), target)
        print(json.dumps(READY), file=replies, flush=True)
        for line in sys.stdin:
            _allow(seconds)
            kind, source = json.loads(line)
            print(json.dumps(tester.problem(kind, source)), file=replies, flush=True)


def _allow(seconds: int) -> None:
    """Have the system end this process after some more processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1 + seconds, resource.RLIM_INFINITY))


def _xgrammar() -> Any:
    """xgrammar without torch; with torch if this release of xgrammar needs more than the stubs."""
    if PLAIN in sys.argv:
        import xgrammar

        return xgrammar
    from lmdeploy_ext.grammars.light import import_xgrammar

    try:
        return import_xgrammar()
    except (ImportError, AttributeError, TypeError) as error:
        print(f"grammar worker: imports torch, which is slow: {error}", file=sys.stderr)
        os.execv(sys.executable, [*sys.orig_argv, PLAIN])


if __name__ == "__main__":
    main(sys.argv[1:])
