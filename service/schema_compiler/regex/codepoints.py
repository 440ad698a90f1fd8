"""Sets of Unicode code points as sorted, disjoint ranges.

The universe is every code point but the surrogates, which are in no text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

Ranges = tuple[tuple[int, int], ...]
"""First and last code points of ranges, ascending, with a gap between any two."""

ALL: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
NONE: Ranges = ()


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The set of the code points in any of the pairs, in whatever order; surrogates are left out."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            if high > merged[-1][1]:
                merged[-1] = (merged[-1][0], high)
        else:
            merged.append((low, high))
    found = tuple(merged)
    if found and found[-1][1] >= 0xD800 and any(h >= 0xD800 and lo <= 0xDFFF for lo, h in found):
        return intersection(found, ALL)
    return found


def union(sets: Iterable[Ranges]) -> Ranges:
    """The code points in any of the sets."""
    return ranges(chain.from_iterable(sets))


def complement(these: Ranges) -> Ranges:
    """The code points that are not in the set."""
    gaps, at = [], 0
    for low, high in these:
        if low > at:
            gaps.append((at, low - 1))
        at = high + 1
    gaps.append((at, 0x10FFFF))
    return intersection(tuple(gap for gap in gaps if gap[0] <= gap[1]), ALL)


def intersection(left: Ranges, right: Ranges) -> Ranges:
    """The code points in both sets."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        low, high = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if low <= high:
            found.append((low, high))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def difference(left: Ranges, right: Ranges) -> Ranges:
    """The code points of the left set that are not in the right one."""
    return intersection(left, complement(right))


def contains(these: Ranges, code: int) -> bool:
    """Whether a code point is in the set."""
    at = bisect_right(these, (code, 0x110000)) - 1
    return at >= 0 and these[at][1] >= code


def partition(sets: Sequence[Ranges]) -> tuple[tuple[Ranges, ...], tuple[int, ...]]:
    """The coarsest division of the universe that every set is a union of.

    Returns the blocks, and for each set a number whose bit b says whether block b belongs to it.
    """
    changes: dict[int, int] = {0: 0, 0xD800: 0, 0xE000: 0, 0x110000: 0}
    for index, these in enumerate(sets):
        for low, high in these:
            changes[low] = changes.get(low, 0) ^ 1 << index
            changes[high + 1] = changes.get(high + 1, 0) ^ 1 << index
    bounds = sorted(changes)
    members: dict[int, list[tuple[int, int]]] = {}
    inside = 0
    for low, after in pairwise(bounds):
        inside ^= changes[low]
        if low != 0xD800:
            members.setdefault(inside, []).append((low, after - 1))
    masks = [0] * len(sets)
    for block, signature in enumerate(members):
        while signature:
            lowest = signature & -signature
            masks[lowest.bit_length() - 1] |= 1 << block
            signature ^= lowest
    return tuple(ranges(pairs) for pairs in members.values()), tuple(masks)
