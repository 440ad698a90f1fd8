"""A process with one engine, in which the steps of a session run one after the other.

Reads a line of JSON for each step from stdin, writes the step's result to its file, and answers with
a line on a pipe of its own: stdout belongs to LMDeploy. Its imports begin at once, so that whoever
started it ahead of time finds them done. The end of stdin ends the process, whatever its engine does.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_kit.context import Context, code_version, write
from benchmarks.gpu_kit.facts import failure
from benchmarks.gpu_kit.plan import SESSIONS, STEPS, Step


class StepFailed(Exception):
    """A step found something wrong. first_difference: the first of it, in full."""

    def __init__(self, message: str, first_difference: Any = None) -> None:
        super().__init__(message)
        self.first_difference = first_difference


@dataclass
class Worker:
    """What a step gets.

    figures: what it found, kept also where it fails later. checks: what was wanted. deadline: by
    ``time.monotonic``; a measurement that takes longer ends there and says so.
    """

    context: Context
    session: str
    figures: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    deadline: float = 0.0
    step: str = ""
    _engine: Any = None
    _start: dict[str, Any] = field(default_factory=dict)

    async def engine(self) -> Any:
        """The session's engine, started by the first step that wants it."""
        if self._engine is None:
            self._engine = await self._started()
        self.figures["engine"] = self._start
        return self._engine

    async def _started(self) -> Any:
        import torch

        from service.engines.common.loops import LoopGuard
        from service.engines.lmdeploy import LMDeployEngine

        session, sizes = SESSIONS[self.session], self.context.sizes
        options = {**session.options, **sizes.options, "loop_guard": LoopGuard(window=0)}
        # Random weights and short texts repeat themselves: the guard would end answers early.
        begun, free = time.monotonic(), torch.cuda.mem_get_info()[0]
        engine: Any = LMDeployEngine(self.context.model(session.model), **options)
        try:
            await engine.start()
        except SystemExit as error:  # LMDeploy's checks of the machine end the process
            raise StepFailed(f"LMDeploy ended with {error.code} while it started") from error
        metrics = (await engine._ready().host.native.get_health_status())["schedule_metrics"]
        self._start.update(
            seconds=round(time.monotonic() - begun, 2),
            gpu_bytes=free - torch.cuda.mem_get_info()[0],
            scheduler=dict(_fields(metrics)),
            details=dict(engine.capabilities.details),
        )
        return engine

    def check(
        self, what: str, measured: Any, wanted: str, right: bool, first_difference: Any = None,
        speed: bool = False,
    ) -> None:  # fmt: skip
        """Note what was measured and wanted; fail the step where it is not right.

        speed: a figure that a dry run cannot be held to.
        """
        judged = not (speed and self.context.dry)
        self.checks.append(
            {
                "what": what,
                "measured": measured,
                "wanted": wanted,
                "right": right if judged else None,
            }
        )
        if judged and not right:
            raise StepFailed(f"{what}: {measured}, wanted: {wanted}", first_difference)

    def progress(self) -> None:
        """Write what has been found so far."""
        write(self.context.result(self.step), self.result("running", 0.0))

    def result(self, status: str, seconds: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "status": status,
            "code": code_version(),
            "session": self.session,
            "seconds": round(seconds, 2),
            "checks": self.checks,
            "figures": self.figures,
        }


def _fields(value: Any) -> list[tuple[str, Any]]:
    """Numbers of an object of LMDeploy's, whatever kind of class it is."""
    if value is None:
        return []
    names = [name for name in dir(value) if not name.startswith("_")]
    found = [(name, getattr(value, name)) for name in names]
    return [(name, one) for name, one in found if isinstance(one, int | float)]


async def run_step(worker: Worker, step: Step, limit_s: float) -> dict[str, Any]:
    """Run one step; its result, whatever happens."""
    module = "workload" if step.name.startswith(("speed", "judge")) else "steps"
    name = step.name.partition("-")[0]
    worker.step, worker.figures, worker.checks = step.name, {}, []
    begun = time.monotonic()
    worker.deadline = begun + limit_s
    try:
        function = getattr(importlib.import_module(f"benchmarks.gpu_kit.{module}"), name)
        check_needs(worker.context, step.needs)
        await function(worker)
    except BaseException as error:
        result = worker.result("failed", time.monotonic() - begun)
        result |= {"failure": failure(error)}
        result["first_difference"] = getattr(error, "first_difference", None)
        if isinstance(error, KeyboardInterrupt):
            raise
        return result
    return worker.result("passed", time.monotonic() - begun)


def check_needs(context: Context, needs: tuple[str, ...]) -> None:
    """Raises StepFailed where `prepare` has not made something."""
    for name in needs:
        broken = context.done(name).with_suffix(".error")
        if broken.exists():
            error = json.loads(broken.read_text())
            raise StepFailed(f"{name} could not be made: {error['message']}", error)
        if not context.done(name).exists():
            raise StepFailed(f"{name} was not made in time")


def warm_up(session: str) -> None:
    """The imports of a session: seconds, which pass beside the session before."""
    names = ["torch", "transformers", "benchmarks.gpu_kit.steps", "benchmarks.gpu_kit.workload"]
    if SESSIONS[session].model:
        names += ["lmdeploy", "service.engines.lmdeploy.loading", "lmdeploy_ext.patches"]
    if session.endswith("pytorch"):
        names += ["lmdeploy.pytorch.engine"]
    elif SESSIONS[session].model:
        names += ["lmdeploy.turbomind.turbomind", "lmdeploy_ext.turbomind.model"]
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            # The step that needs it fails with the same error, in its own result.
            print(f"import of {name} failed: {error!r}", file=sys.stderr, flush=True)


async def serve(worker: Worker, reply: int) -> None:
    loop = asyncio.get_running_loop()
    steps = {step.name: step for step in STEPS}
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        result = await run_step(worker, steps[order["step"]], order["limit_s"])
        if worker.context.dry:
            result["imported"] = sorted({name.partition(".")[0] for name in sys.modules})
        write(worker.context.result(order["step"]), result)
        os.write(reply, b".")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the threads of an engine wait for requests for ever


def main(session: str, reply: int, context: Context) -> None:
    """The process's whole life."""
    from tests.host_runtime.child import end_with_parent

    end_with_parent()
    faulthandler.enable()
    warm_up(session)
    asyncio.run(serve(Worker(context, session), reply))
