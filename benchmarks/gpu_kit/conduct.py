"""Runs the steps: each session's in a process of its own, each step within its limit, and writes what
comes of them at once. A run that was killed goes on where it was: a step that has a result for this
code and this machine is not repeated, one that was under way is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit import facts, report
from benchmarks.gpu_kit.context import ROOT, Context, code_version, read, write
from benchmarks.gpu_kit.plan import BUDGET_S, PREPARE_LIMIT_S, SESSIONS, STEPS, Step
from benchmarks.gpu_kit.prepare import MAKERS

COMPLETE = ("passed", "failed", "timeout", "crashed")
LEAST_SHARE = 0.5
"""Of its limit that must be left of the budget for a step to begin."""
MOST_TIMES, MOST_TIMES_DRY = 2.0, 5.0
"""Of its own limit that a step gets where time is left: one that hangs must not use up all of it. A dry
run may share its processor with anything."""
GRACE_S = 3.0
"""A worker ends a step by itself at its limit; this much later it is ended."""
REPLY = "{reply}"
PATIENCE_S = ((signal.SIGABRT, 4.0), (signal.SIGKILL, 10.0))
"""How a process is ended that takes too long: first so that it writes its stacks, then for good."""


def results_folder(root: Path, dry: bool) -> Path:
    """The folder of this run: the newest one of this code and machine, or a new one of today."""
    machine = re.sub(r"[^a-z0-9]+", "-", facts.gpu_name(dry).lower()).strip("-")
    end = f"{machine}-{code_version()[:8]}"
    known = sorted(path for path in root.glob(f"*-{end}") if path.is_dir())
    return known[-1] if known else root / f"{date.today().isoformat()}-{end}"


class Conductor:
    """One run.

    Args:
        variables: the environment of a process; told whether LMDeploy runs in it.
        steps: those to run, in order.
        say: told what happens.
        out: another folder that gets the summary and the logs after each step.
    """

    def __init__(
        self,
        context: Context,
        variables: Callable[[bool], Mapping[str, str]],
        steps: Sequence[Step] = STEPS,
        budget_s: float = BUDGET_S,
        say: Callable[[str], None] = print,
        out: Path | None = None,
    ) -> None:
        self._context, self._variables, self._steps = context, variables, steps
        self._end = time.monotonic() + budget_s
        self._say, self._out = say, out
        self._makers: list[Process] = []
        self._workers: dict[str, Process] = {}

    def prepare(self) -> None:
        """Begin to make what is missing, in processes beside; a second call does nothing."""
        if self._makers:
            return
        self._context.made.mkdir(parents=True, exist_ok=True)
        for name in MAKERS:
            if not self._context.done(name).exists():
                self._context.done(name).with_suffix(".error").unlink(missing_ok=True)
                self._makers.append(self._process("prepare", name, PREPARE_LIMIT_S))

    def wait_for_makers(self) -> None:
        """Until they are done, or their time is up."""
        for maker in self._makers:
            maker.wait(max(0.0, min(maker.end, self._end) - time.monotonic()))
            maker.stop()

    def left(self) -> list[Step]:
        """Steps without a result of this code."""
        return [step for step in self._steps if not self._is_complete(step)]

    def run(self) -> list[Step]:
        """Run what is left; the steps for which there was no time."""
        try:
            left = self.left()
            while left:
                step = self._next(left)
                behind = [one for one in left if one is not step]
                limit_s = self._limit(step, behind)
                if limit_s < LEAST_SHARE * step.limit_s:
                    self._say(f"no time left: {', '.join(one.name for one in left)}")
                    return left
                self._run(step, behind, limit_s)
                self.summarise()
                left = behind
            return []
        finally:
            self.stop()

    def stop(self) -> None:
        """End every process that still runs."""
        for process in [*self._workers.values(), *self._makers]:
            process.stop()
        self._workers, self._makers = {}, []

    def summarise(self) -> dict[str, Any]:
        """Write the summary of all steps so far."""
        return report.write_summary(self._context, self._steps, self._out)

    def _is_complete(self, step: Step) -> bool:
        found = read(self._context.result(step.name))
        return bool(found) and found["status"] in COMPLETE and found["code"] == code_version()  # type: ignore[index]

    def _next(self, left: Sequence[Step]) -> Step:
        """The first of the session that has what it needs; the very first once that is there."""
        for step in left:
            if step.session == left[0].session and self._is_ready(step):
                return step
        while not self._is_ready(left[0]) and any(maker.alive() for maker in self._makers):
            if time.monotonic() > min(self._end, max(maker.end for maker in self._makers)):
                break
            time.sleep(0.05)
        return left[0]

    def _is_ready(self, step: Step) -> bool:
        done = (self._context.done(name) for name in step.needs)
        return all(path.exists() or path.with_suffix(".error").exists() for path in done)

    def _limit(self, step: Step, behind: Sequence[Step]) -> float:
        """Its own, and of what earlier steps have not used as much as again."""
        remaining = self._end - time.monotonic()
        spare = remaining - step.limit_s - sum(one.limit_s for one in behind)
        most = MOST_TIMES_DRY if self._context.dry else MOST_TIMES
        return min(remaining - GRACE_S, step.limit_s + max(0.0, spare), most * step.limit_s)

    def _run(self, step: Step, behind: Sequence[Step], limit_s: float) -> None:
        path, begun = self._context.result(step.name), time.monotonic()
        base = {"step": step.name, "code": code_version(), "session": step.session}
        write(path, {**base, "status": "running"})
        worker = self._worker(step.session)
        for one in behind:  # its imports begin now, beside the start of this session's engine
            if one.session != step.session:
                self._worker(one.session, ahead=True)
                break
        self._say(f"{step.name}: {step.checks} (at most {limit_s:.0f} s)")
        outcome = worker.order({"step": step.name, "limit_s": limit_s}, limit_s + GRACE_S)
        seconds = time.monotonic() - begun
        found = read(path) or {}
        if outcome != "done":
            found = {**base, **found, "status": outcome, "seconds": round(seconds, 1),
                     "failure": {"message": worker.epitaph(outcome)}}  # fmt: skip
        ended = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        found |= {"part": step.part, "limit_s": round(limit_s, 1), "ended": ended}
        if found["status"] != "passed":
            found |= {"machine": facts.machine(), "log": facts.tail(worker.log)}
        write(path, found)
        message = found.get("failure", {}).get("message", "")
        self._say(
            f"{step.name}: {found['status']} after {seconds:.1f} s {message.splitlines()[0][:300] if message else ''}"
        )
        if outcome != "done":
            worker.stop()
            del self._workers[step.session]
        if not any(one.session == step.session for one in behind):
            self._workers.pop(step.session, worker).stop()

    def _worker(self, session: str, ahead: bool = False) -> Process:
        found = self._workers.get(session)
        if found is None or not found.alive():
            found = self._workers[session] = self._process("work", session, None)
        return found

    def _process(self, kind: str, name: str, limit_s: float | None) -> Process:
        engine = kind == "work" and (bool(SESSIONS[name].model) or name == "alone")
        log = self._context.results / "logs" / f"{kind}-{name}.log"
        command = [
            "-m",
            "benchmarks.gpu_kit",
            "--internal",
            kind,
            name,
            REPLY,
            self._context.to_json(),
        ]
        return Process(command, self._variables(engine), log, limit_s)


class Process:
    """A process of the kit: ``work`` takes orders, ``prepare`` makes one thing.

    command: Python's arguments; `REPLY` in it becomes the number of the pipe for answers.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], log: Path, limit_s: float | None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.end = log, time.monotonic() + (limit_s or 0)
        self._reply, theirs = os.pipe()
        words = [str(theirs) if word == REPLY else word for word in command]
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *words], cwd=ROOT, env=dict(variables),
                stdin=subprocess.PIPE, stdout=sink, stderr=subprocess.STDOUT, pass_fds=(theirs,),
                start_new_session=True,
            )  # fmt: skip
        os.close(theirs)

    def alive(self) -> bool:
        return self._process.poll() is None

    def order(self, order: Mapping[str, Any], limit_s: float) -> str:
        """Send an order and wait for its end: ``done``, ``timeout`` or ``crashed``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self.wait(5.0)
            return "crashed"
        ready, _, _ = select.select([self._reply], [], [], limit_s)
        if not ready:
            return "timeout"
        if os.read(self._reply, 1):
            return "done"
        self.wait(5.0)
        return "crashed"

    def epitaph(self, outcome: str) -> str:
        """What is to be said of a process that did not answer."""
        if outcome == "timeout":
            self.stop()
            return "it took longer than its limit; the stacks of its threads are in the log"
        return f"its process ended with {self._process.poll()}"

    def wait(self, limit_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)

    def stop(self) -> None:
        """End it. A worker goes when its input ends; whatever does not is killed."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # it is gone
                self._process.stdin.close()
        self.wait(1.0)
        for number, patience_s in PATIENCE_S:
            if not self.alive():
                break
            os.killpg(self._process.pid, number)
            self.wait(patience_s)
        if self._reply >= 0:
            os.close(self._reply)
            self._reply = -1
