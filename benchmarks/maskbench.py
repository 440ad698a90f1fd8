"""Grammar engines by themselves beside our pipeline, on a collection of schemas with instances.

``python -m benchmarks maskbench [--schemas FILE.jsonl]``. A line of the file is an object with
``name``, ``schema`` and ``tests``, a list of ``{"valid": …, "data": …}``; it is the format of
guidance-ai/jsonschemabench. Without a file there is nothing to measure and nothing is written.

Every engine lives in a process of its own, which is killed when a schema takes longer than the
service would let it, and started anew after a crash. They take turns, some schemas at a time, so that
none finds the caches of the processor full of what the others did. ``--misses FILE.md`` also writes
down, for our pipeline, what is not exact and why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import queue
import resource
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collection import Case, collection_argument, read_collection
from benchmarks.common import environment, markdown, write_results
from benchmarks.mask_engines import ENGINES, LARGE_LIMITS, OURS, Refused, instance_text, schema_text
from benchmarks.mask_outcomes import Outcome

PEERS = {"llguidance": "llguidance", "llguidance, lenient": "llguidance"}
"""Optional engines, and the package that they need."""
COMPILE_LIMIT_S = 5.0
FOLLOW_LIMIT_S = 60.0
MEMORY_BYTES = 12 << 30
TURN = 50
"""Schemas that an engine judges before the next one does."""
QUICK = 12
"""Every how manyth schema counts with ``--quick`` is chosen so that about this many do."""


# The process of an engine


def serve(name: str) -> None:
    """Answer schemas that come as lines on standard input, each with two lines: when it is compiled,
    and when its instances are judged."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    engine = ENGINES[name]()
    _say("ready")
    for line in sys.stdin:
        engine.rest()
        case = json.loads(line)
        schema = schema_text(case["schema"])
        began = time.perf_counter()
        try:
            grammar = engine.compile(schema)
        except Refused as error:
            seconds = time.perf_counter() - began
            _say("compiled")
            valid = any(test["valid"] for test in case["tests"])
            empty = error.reason == "SCHEMA_UNSATISFIABLE" and not valid
            refused = Outcome(
                "empty" if empty else "refused", seconds, error.reason, str(error), error.located
            )
            _say(asdict(refused))
            continue
        outcome = Outcome("served", time.perf_counter() - began, enforced=grammar.enforced)
        _say("compiled")
        outcome.enforced_alone = grammar.enforced_alone
        for number, test in enumerate(case["tests"]):
            text, valid = instance_text(test["data"]), test["valid"]
            followed = grammar.follow(text)
            passes = followed.accepted and grammar.finally_valid(text)
            if not valid and followed.accepted:
                outcome.accepts_invalid.append(number)
            if not valid and passes:
                outcome.passes_invalid.append(number)
            if valid and not passes:
                outcome.loses_valid.append(number)
            if valid and not followed.accepted:
                outcome.rejects_valid.append(number)
                outcome.stopped[str(number)] = followed.bytes
            if valid and followed.accepted:
                outcome.bytes += followed.bytes
                outcome.mask_s += followed.seconds
                outcome.slowest_s = max(outcome.slowest_s, followed.slowest_s)
        _say(asdict(outcome))


def _say(what: object) -> None:
    print("@" + json.dumps(what), flush=True)


class Engine:
    """An engine at the other end of a pipe; a new one when it had to be killed, or crashed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._start()

    def judge(self, case: Case) -> Outcome:
        assert self._child.stdin is not None
        began = time.perf_counter()
        try:
            self._child.stdin.write(json.dumps(asdict(case)) + "\n")
            self._child.stdin.flush()
            self._read(COMPILE_LIMIT_S)
            return Outcome(**self._read(FOLLOW_LIMIT_S))
        except (queue.Empty, BrokenPipeError) as error:
            what = "timeout" if isinstance(error, queue.Empty) else "crash"
            self.close()
            message = f"exit code {self._child.returncode}: {''.join(self._last_words).strip()}"
            self._start()
            return Outcome(what, time.perf_counter() - began, message=message)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.maskbench", "--serve", self.name]
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._last_words: deque[str] = deque(maxlen=1)
        words = (self._child.stderr, self._last_words)
        threading.Thread(target=_keep_last, args=words, daemon=True).start()
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(self._child, self._lines), daemon=True).start()
        if self._read(120) != "ready":
            raise RuntimeError(f"{self.name} did not start")

    def _read(self, limit_s: float) -> Any:
        """The next message. Raises queue.Empty at the limit, BrokenPipeError when there is none."""
        line = self._lines.get(timeout=limit_s)
        if line is None:
            raise BrokenPipeError
        return json.loads(line)


def _keep_last(lines: Iterable[str], last: deque[str]) -> None:
    """The engines warn of what they ignore, thousands of times."""
    last.extend(lines)


def _forward(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("@"):
            lines.put(line[1:])
    lines.put(None)


# Comparison


def measure(names: Sequence[str], cases: Sequence[Case]) -> dict[str, list[Outcome]]:
    """Outcomes of all schemas by engine; the engines take turns, in changing order."""
    engines = [Engine(name) for name in names]
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    try:
        for turn, start in enumerate(range(0, len(cases), TURN)):
            some = cases[start : start + TURN]
            for engine in engines if turn % 2 else reversed(engines):
                found[engine.name] += [engine.judge(case) for case in some]
            print(f"{start + len(some)} of {len(cases)} schemas", flush=True)
    finally:
        for engine in engines:
            engine.close()
    return found


def row(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A line of the table."""
    served = [one for one in outcomes if one.what == "served"]
    refused = [one for one in outcomes if one.what == "refused"]
    milliseconds = [1e3 * one.seconds for one in outcomes]
    size = sum(one.bytes for one in outcomes)
    found = {
        "engine": name,
        "schemas": len(outcomes),
        "exact": sum(one.exact for one in outcomes),
        "accepts invalid": sum(bool(one.accepts_invalid) for one in outcomes),
        "rejects valid": sum(bool(one.rejects_valid) for one in outcomes),
        "OK answers invalid": sum(bool(one.passes_invalid) for one in outcomes),
        "served": len(served),
        "rightly unsatisfiable": sum(one.what == "empty" for one in outcomes),
        "enforced": sum(one.enforced is True for one in served),
        "enforced by the grammar alone": sum(one.enforced_alone is True for one in served),
        "enforced, yet accepts invalid": sum(
            bool(one.enforced and one.accepts_invalid) for one in served
        ),
        "refused": len(refused),
        "refused without reason and place": sum(not one.located for one in refused),
        "timeouts": sum(one.what == "timeout" for one in outcomes),
        "crashes": sum(one.what == "crash" for one in outcomes),
        "compile p50 ms": float(np.percentile(milliseconds, 50)),
        "compile p99 ms": float(np.percentile(milliseconds, 99)),
        "compile max ms": max(milliseconds),
        "mask us per byte": 1e6 * sum(one.mask_s for one in outcomes) / size if size else "-",
        "slowest byte ms": max(1e3 * one.slowest_s for one in outcomes),
        "refusals": Counter(one.reason for one in refused),
    }  # fmt: skip
    if all(one.enforced is None for one in served):  # the engine does not say
        for key in ("enforced", "enforced by the grammar alone", "enforced, yet accepts invalid"):
            del found[key]
    return found


def compared() -> tuple[list[str], str]:
    """The engines that can run here, and a note on their versions and on those that cannot."""
    names, notes = [], [f"xgrammar {importlib.metadata.version('xgrammar')}"]
    for name in ENGINES:
        package = PEERS.get(name)
        if package is None or importlib.util.find_spec(package) is not None:
            names.append(name)
            if package:
                notes.append(f"{package} {importlib.metadata.version(package)}")
        else:
            notes.append(f"{name} is not installed and was left out")
    return names, ", ".join(notes)


NOTES = """{versions}. {schemas} schemas with {instances} instances; one without instances counts as exact where it is \
served. Ours runs with max_schema_bytes {bytes} and max_regex_length {regex}, with properties in the declared \
order, then in any order, and once more with the declared order and the default limits. Lengths of strings are \
counted beside the grammar, as the engines do; what is said of the grammar means both. Valid instances in another \
order, and with names such as "labels " that garble a declared one, count as rejected. Byte vocabulary: the text of \
an instance is `json.dumps` of it without escapes, followed byte by byte. \
accepts invalid, rejects valid: schemas of which the grammar alone misjudges an instance; rightly unsatisfiable: \
refused because no value fits, which no instance contradicts, and counted as exact; OK answers invalid: after \
the final validation, which ours has, and the lenient mode of llguidance (unknown formats and unsupported keywords \
ignored) borrows. enforced: the analysis says that no complete answer can violate a keyword; enforced by the \
grammar alone: with an engine that counts nothing beside it. \
refused without reason and place: for ours a reason code and a JSON pointer, or limit and size; xgrammar's \
messages name lines of its source, llguidance's the keyword. compile: everything until there is a grammar, for \
ours admission, analysis and compilation; killed after {limit:g} s. mask: mask and step, called from Python, \
over the valid instances that are accepted; for ours with limits of strings in Python, as in the reference engine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few schemas, to see that it runs")
    collection_argument(parser)
    parser.add_argument("--misses", type=Path, metavar="FILE.md", help="what ours misses, and why")
    parser.add_argument("--only", nargs="+", choices=tuple(ENGINES), help="these engines alone")
    parser.add_argument("--serve", choices=tuple(ENGINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    cases = read_collection(options.schemas)
    if cases is None:
        return
    cases = cases[:: max(1, len(cases) // QUICK)] if options.quick else cases
    names, versions = compared()
    names = options.only or names
    found = measure(names, cases)
    rows = [row(name, found[name]) for name in names]
    instances = sum(len(case.tests) for case in cases)
    notes = NOTES.format(
        versions=versions, schemas=len(cases), instances=instances, limit=COMPILE_LIMIT_S,
        bytes=LARGE_LIMITS.max_bytes, regex=LARGE_LIMITS.max_regex_length,
    )  # fmt: skip
    if not options.only:
        write_results("maskbench", rows, notes)
    if options.misses:
        from benchmarks.mask_misses import misses

        options.misses.write_text(misses(cases, found[OURS]))
    print(environment())
    print(markdown([{k: v for k, v in one.items() if k != "refusals"} for one in rows]))


if __name__ == "__main__":
    main()
