"""Where the features of a forward come from and where they go. Plain numbers: no torch, no LMDeploy.

A prompt may be prefilled in several forwards, and an image may lie in two of them: TurboMind then
encodes the whole image each time and takes the rows that it needs. Tokens in the prefix cache do
not come again; their keys and values have the features in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""``[begin, end)``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward in which images are prefilled.

    Attributes:
        tokens: of all images in the vision tower, whole ones.
        rows: image tokens among the forward's tokens; no more than ``tokens``.
        sources: the rows as ranges of the tower's tokens.
        targets: the same rows, in the same order, as ranges of the forward's tokens.
    """

    tokens: int
    rows: int
    sources: tuple[Range, ...]
    targets: tuple[Range, ...]


def plan(segments: Iterable[Sequence[int]]) -> Plan | None:
    """The plan of a batch; None when no image enters the tower.

    Args:
        segments: of each run of text or image tokens in the forward: first token of the forward,
            tokens, base position, height and width of the image in tokens (0 for text), tokens
            of the image before this forward. Images stand in the order in which the tower
            gets them; each is one frame, as `lmdeploy_ext.packing` sends them.

    Raises:
        ValueError: a segment that is none.
    """
    sources: list[Range] = []
    targets: list[Range] = []
    tokens = rows = 0
    for segment in segments:
        row, count, _, height, width, offset = segment
        if height == 0:
            continue
        size = height * width
        if min(row, offset, height, width) < 0 or count < 1 or offset + count > size:
            raise ValueError(f"{tuple(segment)} is no part of an image")
        _append(sources, tokens + offset, tokens + offset + count)
        _append(targets, row, row + count)
        tokens += size
        rows += count
    return Plan(tokens, rows, tuple(sources), tuple(targets)) if rows else None


def _append(ranges: list[Range], begin: int, end: int) -> None:
    """Add a range, joined with the last one where it follows it."""
    if ranges and ranges[-1][1] == begin:
        begin = ranges.pop()[0]
    ranges.append((begin, end))
