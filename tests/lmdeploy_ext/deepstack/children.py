"""Child's side: requests through the stock engine with DeepStack, watched or with faults put in."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from tests.host_runtime.answers import answers
from tests.host_runtime.cases import Case

Answers = list[list[dict[str, Any]]]


def watched_answers(
    checkpoint: str, cases: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]
) -> tuple[Answers, list[str]]:
    """The answers, and what kinds of batches there were; see `_kinds`."""
    kinds: Counter[str] = Counter()
    with watched(kinds):
        return answers(checkpoint, cases, runs), sorted(kinds)


@contextmanager
def watched(kinds: Counter[str]) -> Iterator[None]:
    """Counts what kinds of batches there are; see `_kinds`."""
    from lmdeploy_ext.deepstack import features

    plan, add = features.plan, features.Features._add

    def planned(segments: Sequence[Sequence[int]]) -> Any:
        kinds.update(_kinds(segments))
        return plan(segments)

    def added(self: Any, event: Any) -> None:
        if event.count > self._plan.targets[-1][1]:
            kinds["rows behind the last picture"] += 1
        add(self, event)

    with mock.patch.object(features, "plan", planned), mock.patch.object(
        features.Features, "_add", added
    ):  # fmt: skip
        yield


def _kinds(segments: Sequence[Sequence[int]]) -> Iterator[str]:
    pictures = [segment for segment in segments if segment[3]]
    if not pictures:
        yield "text of a prompt whose pictures came before"
    if len(pictures) > 1:
        yield "several pictures"
    for _, count, _, height, width, offset in pictures:
        yield "end of a picture" if offset else "beginning of a picture"
        if offset + count < height * width:
            yield "not the end of a picture"


# ---- faults -------------------------------------------------------------------------------------


def _drop(layer: int) -> Callable[[Any, Any], Any]:
    def patch(features: Any, original: Any) -> Any:
        def add(self: Any, event: Any) -> None:
            if event.index != layer:
                original(self, event)

        return mock.patch.object(features.Features, "_add", add)

    return patch


def _swap(features: Any, original: Any) -> Any:
    def add(self: Any, event: Any) -> None:
        with mock.patch.object(self, "_features", self._features.flip(0)):
            original(self, event)

    return mock.patch.object(features.Features, "_add", add)


def _moved(by: int) -> Callable[[Any, Any], Any]:
    """Rows of the residual off by some, as far as the forward has them."""

    def patch(features: Any, original: Any) -> Any:
        def add(self: Any, event: Any) -> None:
            ranges = self._plan.targets
            if ranges[0][0] + by >= 0 and ranges[-1][1] + by <= event.count:
                moved = tuple((begin + by, end + by) for begin, end in ranges)
                changed = type(self._plan)(
                    self._plan.tokens, self._plan.rows, self._plan.sources, moved
                )
                with mock.patch.object(self, "_plan", changed):
                    original(self, event)
            else:
                original(self, event)

        return mock.patch.object(features.Features, "_add", add)

    return patch


def _rolled(features: Any, original: Any) -> Any:
    """Features of neighbouring tokens."""

    def add(self: Any, event: Any) -> None:
        with mock.patch.object(self, "_features", self._features.roll(1, 1)):
            original(self, event)

    return mock.patch.object(features.Features, "_add", add)


def _replanned(change: Callable[[Sequence[Sequence[int]]], Any]) -> Callable[[Any, Any], Any]:
    def patch(features: Any, original: Any) -> Any:
        plan = features.plan
        return mock.patch.object(features, "plan", lambda segments: plan(change(segments)))

    return patch


def _from_the_start(segments: Sequence[Sequence[int]]) -> Any:
    """The part of a picture that a forward has is taken for its beginning."""
    return [[*segment[:5], 0] for segment in segments]


def _stale(features: Any, original: Any) -> Any:
    """What the first picture of a block gave serves for ever."""
    compute = features.Features._compute

    def once(self: Any, event: Any) -> None:
        compute(self, event)
        kept = self.__dict__.setdefault("kept", {})
        layer = self._layer[event.index]
        kept.setdefault(layer, self._features[layer].clone())
        self._features[layer] = kept[layer]

    return mock.patch.object(features.Features, "_compute", once)


def _twice(features: Any, original: Any) -> Any:
    def add(self: Any, event: Any) -> None:
        original(self, event)
        original(self, event)

    return mock.patch.object(features.Features, "_add", add)


FAULTS: dict[str, Callable[[Any, Any], Any]] = {
    "feature 0 dropped": _drop(0),
    "feature 1 dropped": _drop(1),
    "features swapped": _swap,
    "one row late": _moved(1),
    "one row early": _moved(-1),
    "features of the token before": _rolled,
    "beginning of the picture instead of its part": _replanned(_from_the_start),
    "features of the first picture": _stale,
    "added twice": _twice,
}


def faulty_answers(
    checkpoint: str,
    cases: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    faults: Sequence[str],
) -> dict[str, list[dict[str, Any]]]:
    """The answers under each fault, each on a new engine."""
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features

    lmdeploy_ext.install("require")
    found = {}
    for name in faults:
        with FAULTS[name](features, features.Features._add):
            (found[name],) = answers(checkpoint, cases, [run])
    return found


# ---- row by row -----------------------------------------------------------------------------------


def added_rows(
    checkpoint: str,
    case: Mapping[str, Any],
    settings: Mapping[str, Any],
    faults: Sequence[str],
    path: str,
) -> list[int]:
    """Ask one case on a new engine for each fault, "" being none, and again with another ending.

    Saves by fault what was added to the residual in both rounds, a pair of (layers, rows, width),
    where a row is a token of the prompt that did not come from the prefix cache.

    Returns:
        Tokens that came from the prefix cache in the last round, by fault.
    """
    import lmdeploy_ext
    from lmdeploy_ext.deepstack import features

    lmdeploy_ext.install("require")
    rows, cached = {}, []
    for name in faults:
        with ExitStack() as stack:
            if name:
                stack.enter_context(FAULTS[name](features, features.Features._add))
            pair = asyncio.run(_two_rounds(checkpoint, Case.from_json(case), dict(settings)))
        rows[name] = [found for found, _ in pair]
        cached.append(pair[1][1])
    torch.save(rows, path)
    return cached


async def _two_rounds(
    checkpoint: str, case: Case, settings: dict[str, Any]
) -> list[tuple[torch.Tensor, int]]:
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask

    engine = engines.turbomind(checkpoint, **settings)
    found = []
    ended = case.spans[-1][1]
    other = [token + 1 for token in case.tokens[ended:]]  # else all of it would be in the cache
    for asked in (case, replace(case, tokens=case.tokens[:ended] + other)):
        with _recorded() as take:
            answer = await ask(engine, asked)
        found.append((take(), answer.cached_tokens or 0))
    await engines.stop(engine)
    return found


@contextmanager
def _recorded() -> Iterator[Callable[[], torch.Tensor]]:
    """Records one request: how the forwards of its prompt lie, and how its residual changes."""
    from lmdeploy_ext.deepstack import features

    plan, add = features.plan, features.Features._add
    batches: list[tuple[int, bool]] = []
    changes: list[torch.Tensor] = []

    def planned(segments: Sequence[Sequence[int]]) -> Any:
        found = plan(segments)
        batches.append((sum(segment[1] for segment in segments), found is not None))
        return found

    def added(self: Any, event: Any) -> None:
        residual = self._view(event)
        before = residual.float()
        add(self, event)
        changes.append(residual.float() - before)

    def take() -> torch.Tensor:
        layers = len(changes) // max(1, sum(pictures for _, pictures in batches))
        assert layers, "no forward had pictures"
        width, rest = changes[0].shape[-1], list(changes)
        parts = []
        for count, pictures in batches:
            if pictures:
                parts.append(torch.stack([rest.pop(0) for _ in range(layers)]))
            else:
                parts.append(torch.zeros(layers, count, width))
        assert not rest
        return torch.cat(parts, dim=1)

    with mock.patch.object(features, "plan", planned), mock.patch.object(
        features.Features, "_add", added
    ):  # fmt: skip
        yield take


# ---- cancellation ---------------------------------------------------------------------------------


def answers_among_cancelled(
    checkpoint: str, cases: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], rounds: int
) -> list[list[dict[str, Any]]]:
    """All cases at once, every other one cancelled at some time; the answers of the others."""
    import random

    import lmdeploy_ext

    lmdeploy_ext.install("require")
    return asyncio.run(
        _among_cancelled(
            checkpoint, [Case.from_json(c) for c in cases], settings, rounds, random.Random(4)
        )
    )


async def _among_cancelled(
    checkpoint: str, cases: Sequence[Case], settings: Mapping[str, Any], rounds: int, source: Any
) -> list[list[dict[str, Any]]]:
    from tests.host_runtime import engines
    from tests.host_runtime.answers import ask

    engine = engines.turbomind(checkpoint, **settings)
    found = []
    for _ in range(rounds):
        kept = [asyncio.create_task(ask(engine, case, source.random() * 0.2)) for case in cases]
        dropped = [asyncio.create_task(ask(engine, case, source.random() * 0.2)) for case in cases]
        for task in dropped:
            asyncio.get_running_loop().call_later(source.random() * 0.4, task.cancel)
        await asyncio.gather(*dropped, return_exceptions=True)
        found.append([vars(answer) for answer in await asyncio.gather(*kept)])
        assert any(task.cancelled() for task in dropped)
    await engines.stop(engine)
    return found
