"""Faults that can be put into DeepStack, in the process that runs it. Tests must notice each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock


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
    """The part of an image that a forward has is taken for its beginning."""
    return [[*segment[:5], 0] for segment in segments]


def _stale(features: Any, original: Any) -> Any:
    """What the first image of a block gave serves for ever."""
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
    "feature 2 dropped": _drop(2),
    "features swapped": _swap,
    "one row late": _moved(1),
    "one row early": _moved(-1),
    "features of the token before": _rolled,
    "beginning of the image instead of its part": _replanned(_from_the_start),
    "features of the first image": _stale,
    "added twice": _twice,
}
