"""What DeepStack does in the stock engine, batch by batch: for code that runs in a child."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

Segments = Sequence[Sequence[int]]
Forward = dict[str, Any]
"""One forward with images, in types that `torch.load` trusts.

pieces: for each piece of an image: its rows in the forward, the image's height and width in tokens,
    and its tokens before this piece.
added: what these rows got, (features, rows of all pieces, width), in float32.
others: whether any other row changed.
beside: rows of other requests: those that only decode, or have no images.
"""


@contextmanager
def watched(kinds: Counter[str], forwards: list[Forward] | None = None) -> Iterator[None]:
    """Counts what kinds of batches there are, and records each forward if there is a list for it."""
    from lmdeploy_ext.deepstack import features

    plan, add = features.plan, features.Features._add
    tables: list[tuple[Any, Segments]] = []

    def planned(segments: Segments) -> Any:
        found = plan(segments)
        kinds.update(_kinds(segments))
        tables.append((found, segments))
        return found

    def added(self: Any, event: Any) -> None:
        segments = next(table for one, table in reversed(tables) if one is self._plan)
        beside = event.count - sum(segment[1] for segment in segments)
        if event.index == 0:
            kinds["rows behind the last image"] += event.count > self._plan.targets[-1][1]
            kinds["rows of other requests"] += beside > 0
        if forwards is None:
            add(self, event)
            return
        residual = self._view(event)
        before = residual.float()
        add(self, event)
        if event.index == 0:
            forwards.append(_forward(segments, beside))
        _record(forwards[-1], residual.float() - before)

    with mock.patch.object(features, "plan", planned), mock.patch.object(
        features.Features, "_add", added
    ):  # fmt: skip
        yield


def _forward(segments: Segments, beside: int) -> Forward:
    pieces = [
        [row, count, height, width, offset]
        for row, count, _, height, width, offset in segments
        if height
    ]
    return {"pieces": pieces, "added": None, "others": False, "beside": beside}


def _record(forward: Forward, change: torch.Tensor) -> None:
    """Add what one feature changed of all rows (rows, width)."""
    rows = [row for begin, count, *_ in forward["pieces"] for row in range(begin, begin + count)]
    part = change[rows][None]
    before = forward["added"]
    forward["added"] = part if before is None else torch.cat([before, part])
    rest = torch.ones(len(change), dtype=torch.bool)
    rest[rows] = False
    forward["others"] |= bool(change[rest].any())


def _kinds(segments: Segments) -> Iterator[str]:
    images = [segment for segment in segments if segment[3]]
    if not images:
        yield "text of a prompt whose images came before"
    if len(images) > 1:
        yield "several images"
    for _, count, _, height, width, offset in images:
        yield "end of an image" if offset else "beginning of an image"
        if offset + count < height * width:
            yield "not the end of an image"
