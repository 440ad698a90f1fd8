"""Plans which features of a forward are added to which rows. Plain numbers, without torch and
LMDeploy.

A prompt may be prefilled in several forwards, and the tokens of an image may be split between two
of them: TurboMind then encodes the whole image each time and uses the rows that it needs. Tokens
from the prefix cache are not computed again; their keys and values already include the features.
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
        tokens: number of tokens of all images in the vision tower, counting whole images.
        rows: number of image tokens among the forward's tokens; at most ``tokens``.
        sources: these rows as ranges of the tower's tokens.
        targets: the same rows, in the same order, as ranges of the forward's tokens.
    """

    tokens: int
    rows: int
    sources: tuple[Range, ...]
    targets: tuple[Range, ...]


def plan(segments: Iterable[Sequence[int]]) -> Plan | None:
    """The plan of a batch; None if no image enters the tower.

    Args:
        segments: for each run of text or image tokens in the forward: index of its first token in
        the forward, number of tokens, base position, height and width of the image in tokens (0 for
        text), number of the image's tokens before this forward. Images have the order in which the
        tower gets them; each is one frame, as in `lmdeploy_ext.packing`.

    Raises:
        ValueError: a segment is invalid.
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
    """Append a range, merged with the last range if both are adjacent."""
    if ranges and ranges[-1][1] == begin:
        begin = ranges.pop()[0]
    ranges.append((begin, end))
