"""A worker process that analyses grammars: ``python -m service.structured_output.worker``.

Reads requests from stdin and writes answers to stdout, one at a time, in the frames of ``wire``.
Only these processes pass texts of callers to third-party parsers, so that a crash, an endless loop
or a huge memory use fails one request only. ``pool`` starts and kills the processes.

A worker ends with its parent: its stdin is then closed, and an alarm ends even a call that never
returns.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from service.logs import trace_crashes

if TYPE_CHECKING:
    from service.schema_compiler.limits import SchemaLimits
    from service.schema_compiler.report import Analysed
    from service.types import Grammar

MEMORY_BYTES = 2 << 30
"""Maximum address space, in bytes; a worker uses 256 MB of it after its start."""
GRACE_S = 5.0
"""The parent kills a worker at the time limit of a request. If the parent has died, an alarm ends
the worker so many seconds later."""
WEIGHT_BYTES = 1 << 30
"""Resident memory, in bytes, above which a worker exits after an answer, because Python does not
return free memory to the system."""
WATCH_INTERVAL_S = 0.05
PLAIN = "--plain"
_ALL_EVERY = 64

Answers = Callable[[dict[str, Any]], dict[str, Any]]
Analyse = Callable[["Grammar", "SchemaLimits"], "Analysed"]


def main(answer: Answers | None = None) -> None:
    """Answer requests until stdin ends. answer: replaces ``answers()`` in tests."""
    trace_crashes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C and ends its workers
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # a system without memory kills this process before the server
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    from service.structured_output.wire import frame

    answer = answer or answers()
    trace_crashes()
    gc.freeze()  # exclude imported modules from garbage collection
    gc.disable()  # collections take a fifth of an analysis: run them between requests
    requests, replies = sys.stdin.buffer, _private_stdout()
    replies.write(frame({"ready": True}))
    replies.flush()
    answered = 0
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + GRACE_S)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        heavy = _resident_bytes() > WEIGHT_BYTES
        replies.write(frame(reply | {"last": heavy}))
        replies.flush()
        if heavy:
            return
        answered += 1
        collect(answered)


def _limit_memory() -> None:
    """Limit the address space. On systems that do not support this (macOS), watch the resident
    memory instead."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    except (OSError, ValueError):
        threading.Thread(target=_watch_memory, name="memory", daemon=True).start()


def _watch_memory() -> None:
    """End this process when its resident memory exceeds the limit. The server then refuses the
    grammar, as after a crash."""
    wait = threading.Event().wait
    while _resident_bytes() <= MEMORY_BYTES:
        wait(WATCH_INTERVAL_S)
    print("grammar worker: takes too much memory and ends", file=sys.stderr, flush=True)
    os._exit(1)


def collect(answered: int) -> None:
    """Collect the garbage of one answer; after many answers, collect all generations."""
    gc.collect(2 if answered % _ALL_EVERY == 0 else 0)


def answers(analyse: Analyse | None = None) -> Answers:
    """Return the function that analyses and tests the grammar of a request. analyse: replaces the
    compiler in tests."""
    from service.errors import GrammarError
    from service.structured_output import wire
    from service.structured_output.trial import Trial

    if analyse is None:
        from service.schema_compiler import api

        analyse = api.analyse
    trial = _trial(Trial)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        grammar, limits, _ = wire.read_request(request)
        try:
            analysed = analyse(grammar, limits)
            trial.run(analysed.grammar)
        except GrammarError as error:
            return wire.write_refusal(error)
        except MemoryError:
            return wire.write_refusal(
                GrammarError(
                    f"grammar.{grammar.kind.value}",
                    "takes too much memory to compile; make it smaller",
                    reason="GRAMMAR_TOO_COSTLY",
                )
            )
        return wire.write_analysed(grammar, analysed)

    return answer


def _trial(make: Any) -> Any:
    """The trial without torch; with torch if this release of xgrammar needs more than the stubs."""
    if PLAIN in sys.argv:
        return make(light=False)
    try:
        return make(light=True)
    except (ImportError, AttributeError, TypeError) as error:
        print(f"grammar worker: imports torch, which is slow: {error}", file=sys.stderr)
        os.execv(sys.executable, [*sys.orig_argv, PLAIN])


def _resident_bytes() -> int:
    """Resident memory of this process, in bytes; its peak on systems that do not tell the current
    value.

    On Linux the peak would include the memory of the parent at the time of the fork.
    """
    try:
        with open("/proc/self/statm") as status:
            return int(status.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _private_stdout() -> BinaryIO:
    """A private copy of stdout for answers. Other output to stdout goes to stderr from now on."""
    private = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return os.fdopen(private, "wb")


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    """The next request, or None at the end of the stream."""
    import json

    from service.structured_output.wire import LENGTH

    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    found: dict[str, Any] | None = json.loads(body) if len(body) == length else None
    return found


if __name__ == "__main__":
    main()
