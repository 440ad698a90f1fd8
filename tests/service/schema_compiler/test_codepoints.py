"""Sets of code points against Python's sets."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.schema_compiler.regex import codepoints
from service.schema_compiler.regex.codepoints import ALL, Ranges

WINDOW = range(0xD7F0, 0xE010)
"""Code points around the surrogates, which are in no set."""
pairs = st.lists(
    st.tuples(st.sampled_from(WINDOW), st.integers(0, 9)).map(
        lambda pair: (pair[0], pair[0] + pair[1])
    ),
    max_size=6,
)


def members(these: Ranges) -> set[int]:
    return {code for low, high in these for code in range(low, high + 1)}


def size(these: Ranges) -> int:
    return sum(high - low + 1 for low, high in these)


def legal(found: list[tuple[int, int]]) -> set[int]:
    return {c for low, high in found for c in range(low, high + 1) if not 0xD800 <= c < 0xE000}


@settings(max_examples=40)
@given(pairs, pairs)
def test_sets_are_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    one, other = codepoints.ranges(left), codepoints.ranges(right)
    assert members(one) == legal(left)
    assert members(codepoints.union([one, other])) == legal(left) | legal(right)
    assert members(codepoints.intersection(one, other)) == legal(left) & legal(right)
    assert members(codepoints.difference(one, other)) == legal(left) - legal(right)
    assert codepoints.complement(codepoints.complement(one)) == one
    assert not codepoints.intersection(codepoints.complement(one), one)
    assert size(codepoints.complement(one)) + size(one) == size(ALL)
    assert all(codepoints.contains(one, code) == (code in legal(left)) for code in WINDOW)


def test_ranges_are_as_few_as_can_be() -> None:
    assert codepoints.ranges([(5, 6), (1, 2), (3, 4), (9, 9)]) == ((1, 6), (9, 9))
    assert codepoints.ranges([(0, 0x10FFFF)]) == ALL == codepoints.complement(())


@settings(max_examples=40)
@given(st.lists(pairs, max_size=4))
def test_blocks_divide_the_universe(sets: list[list[tuple[int, int]]]) -> None:
    wanted = [codepoints.ranges(found) for found in sets]
    blocks, masks = codepoints.partition(wanted)
    assert codepoints.union(blocks) == ALL
    assert sum(map(size, blocks)) == size(ALL) == 0x110000 - 0x800
    for these, mask in zip(wanted, masks, strict=True):
        inside = [block for at, block in enumerate(blocks) if mask >> at & 1]
        assert codepoints.union(inside) == these
    assert len({tuple(m >> at & 1 for m in masks) for at in range(len(blocks))}) == len(blocks)
