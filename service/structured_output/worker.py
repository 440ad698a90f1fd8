"""A process that analyses grammars: ``python -m service.structured_output.worker``.

Reads requests from stdin and writes answers to stdout, one at a time, in the frames of ``wire``.
Parsers of third parties see texts of callers only here, where a crash, a hang or an appetite for
memory costs one request. ``pool`` starts such processes and kills them.

It ends with its parent: stdin is at its end then, and an alarm ends even a call that never returns.
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
    from service.schema_compiler.report import Analysed
    from service.schema_compiler.schema import SchemaLimits
    from service.types import Grammar

MEMORY_BYTES = 2 << 30
"""Address space; a quarter of a gigabyte of it is taken at the start."""
GRACE_S = 5.0
"""The parent kills at the limit of a request. Where there is none any more, the alarm comes so much
later."""
WEIGHT_BYTES = 1 << 30
"""Resident memory with which a process ends after its answer: what is free is not given back."""
WATCH_INTERVAL_S = 0.05
PLAIN = "--plain"
_ALL_EVERY = 64

Answers = Callable[[dict[str, Any]], dict[str, Any]]
Analyse = Callable[["Grammar", "SchemaLimits"], "Analysed"]


def main(answer: Answers | None = None) -> None:
    """Answer until stdin ends. answer: in place of ``answers()``."""
    trace_crashes()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the server, which ends its children
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # a system that is short of memory ends this process, not the server
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    from service.structured_output.wire import frame

    answer = answer or answers()
    trace_crashes()
    gc.freeze()  # what was imported stays, so that collections need not look through it
    gc.disable()  # a fifth of an analysis would be collections: they come between requests
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
    """Bound the address space; where the system cannot, as macOS, end this process above the bound."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    except (OSError, ValueError):
        threading.Thread(target=_watch_memory, name="memory", daemon=True).start()


def _watch_memory() -> None:
    """End this process when its resident memory is above the bound. The caller's grammar is refused
    then as one that ended the process."""
    wait = threading.Event().wait
    while _resident_bytes() <= MEMORY_BYTES:
        wait(WATCH_INTERVAL_S)
    print("grammar worker: takes too much memory and ends", file=sys.stderr, flush=True)
    os._exit(1)


def collect(answered: int) -> None:
    """Collect the garbage of an answer; after many answers, also what has left the caches since."""
    gc.collect(2 if answered % _ALL_EVERY == 0 else 0)


def answers(analyse: Analyse | None = None) -> Answers:
    """Analysis and trial of the grammar in a request. analyse: in place of the service's own."""
    from service.errors import GrammarError
    from service.structured_output import wire
    from service.structured_output.trial import Trial

    if analyse is None:
        from service.schema_compiler import analysis

        analyse = analysis.analyse
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
        return wire.write_analysed(analysed)

    return answer


def _trial(make: Any) -> Any:
    """The trial without torch. A release of xgrammar that needs more of it gets all of it."""
    if PLAIN in sys.argv:
        return make(light=False)
    try:
        return make(light=True)
    except (ImportError, AttributeError, TypeError) as error:
        print(f"grammar worker: imports torch, which is slow: {error}", file=sys.stderr)
        os.execv(sys.executable, [*sys.orig_argv, PLAIN])


def _resident_bytes() -> int:
    """Resident memory of this process; the most that it has had where the system says no more.

    On Linux that most would count what the parent had at the fork.
    """
    try:
        with open("/proc/self/statm") as status:
            return int(status.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _private_stdout() -> BinaryIO:
    """Where answers go. Whatever else writes to stdout writes to stderr from now on."""
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
