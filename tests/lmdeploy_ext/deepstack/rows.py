"""Child's side of the tests that look at every row: requests through the stock engine, forwards recorded."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case
from tests.lmdeploy_ext.deepstack.faults import FAULTS
from tests.lmdeploy_ext.deepstack.watching import Forward, Segments, watched

Answers = list[list[dict[str, Any]]]
PATIENCE_S = 20


def recorded_answers(
    checkpoint: str,
    cases: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    path: str,
) -> tuple[Answers, list[str]]:
    """Ask every case in every run.

    Args:
        runs: as `tests.host_runtime.answers.answers` takes them; ``broken`` names one of `FAULTS`.
        path: a file that gets the forwards with images of each run, as `watching.Forward`.

    Returns:
        The answers, and what kinds of batches there were.
    """
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features

    lmdeploy_ext.install("require")
    found: Answers = []
    recorded: list[list[Forward]] = []
    kinds: Counter[str] = Counter()
    for run in runs:
        settings = dict(run)
        with ExitStack() as stack:
            if name := settings.pop("broken", ""):
                stack.enter_context(FAULTS[name](features, features.Features._add))
            recorded.append([])
            stack.enter_context(watched(kinds, recorded[-1]))
            found += answers(checkpoint, cases, [settings])
    torch.save(recorded, path)
    return found, sorted(+kinds)


def beside_an_answer(
    checkpoint: str,
    first: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    path: str,
) -> list[dict[str, Any]]:
    """One request is being answered when the others come, one by one.

    Returns:
        The answers of all; the file gets the forwards of the others.
    """
    import lmdeploy_ext

    lmdeploy_ext.install("require")
    ready = [Case.from_json(case) for case in (first, *others)]
    return asyncio.run(_beside(checkpoint, ready, settings, path))


async def _beside(
    checkpoint: str, cases: Sequence[Case], settings: Mapping[str, Any], path: str
) -> list[dict[str, Any]]:
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask

    engine = engines.turbomind(checkpoint, **settings)
    answer = engines.Answer()
    task = asyncio.create_task(ask(engine, cases[0], answer=answer))
    while not answer.tokens:  # noqa: ASYNC110 (nobody tells)
        await asyncio.sleep(0.001)
    forwards: list[Forward] = []
    with watched(Counter(), forwards):
        others = [await ask(engine, case) for case in cases[1:]]
        assert not task.done(), "the first answer was to be longer"
    found = [await task, *others]
    await engines.stop(engine)
    torch.save([forwards], path)
    return [vars(one) for one in found]


def cancelled_when_set_up(
    checkpoint: str,
    doomed: Mapping[str, Any],
    cases: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    path: str,
) -> tuple[list[dict[str, Any]], list[str]]:
    """A request is cancelled when its batch is set up and the forward has not begun; others stay.

    Returns:
        The answers, its own last, and what came when: "set up", "cancelled", "forward" for
        each of its blocks with a feature.
    """
    import lmdeploy_ext

    lmdeploy_ext.install("require")
    ready = [Case.from_json(case) for case in cases]
    return asyncio.run(_cancelled(checkpoint, Case.from_json(doomed), ready, settings, path))


async def _cancelled(
    checkpoint: str, doomed: Case, cases: Sequence[Case], settings: Mapping[str, Any], path: str
) -> tuple[list[dict[str, Any]], list[str]]:
    from lmdeploy_ext.deepstack import features
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask

    engine = engines.turbomind(checkpoint, **settings)
    loop, order, plans = asyncio.get_running_loop(), list[str](), list[Any]()
    sent, gone = threading.Semaphore(0), threading.Event()
    plan, compute = features.plan, features.Features._compute
    ((_, height, width),) = doomed.grids

    def planned(segments: Segments) -> Any:
        found = plan(segments)
        if not plans:  # the next batch is to have all the others
            assert all(sent.acquire(timeout=PATIENCE_S) for _ in (doomed, *cases))
        own = any(list(segment[3:5]) == [height // 2, width // 2] for segment in segments)
        plans.append((found, own))
        if own:
            order.append("set up")
            loop.call_soon_threadsafe(task.cancel)
            assert gone.wait(PATIENCE_S)
        return found

    def computed(self: Any, event: Any) -> None:
        if (self._plan, True) in plans:
            order.append("forward")
        compute(self, event)

    def cancelled() -> None:
        order.append("cancelled")
        gone.set()

    def instance() -> Any:
        made = engine.create_instance()
        made._model_inst = _Noticing(made.model_inst, sent.release, cancelled)
        return made

    def start(case: Case) -> asyncio.Task[Any]:
        return asyncio.create_task(ask(SimpleNamespace(create_instance=instance), case))

    forwards: list[Forward] = []
    with mock.patch.object(features, "plan", planned), mock.patch.object(
        features.Features, "_compute", computed
    ), watched(Counter(), forwards):  # fmt: skip
        first, task, *rest = (start(case) for case in (cases[0], doomed, *cases[1:]))
        found = await asyncio.gather(first, *rest, task)
    await engines.stop(engine)
    torch.save([forwards], path)
    return [vars(one) for one in found], order


class _Noticing:
    """TurboMind's side of a request, which says when it is sent and when it is cancelled."""

    def __init__(
        self, native: Any, sent: Callable[[], None], cancelled: Callable[[], None]
    ) -> None:
        self._native, self._sent, self._cancelled = native, sent, cancelled

    def forward(self, *arguments: Any) -> Any:
        found = self._native.forward(*arguments)
        self._sent()
        return found

    def cancel(self) -> None:
        self._native.cancel()
        self._cancelled()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)
