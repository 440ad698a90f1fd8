"""Classes of characters in the form that every xgrammar reads alike."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.schema_compiler.emit.json_escapes import PLAIN, character_class, encoded

codes = st.sampled_from(
    [c + d for c in (0, 0x80, 0x800, 0x1000, 0x2000, 0xD000, 0xE000, 0x10000) for d in (-1, 0, 1)]
    + [0x7F, 0xD7FF, 0x4E00, 0x9FA5, 0x1F600, 0x10FFFE, 0x10FFFF]
).filter(lambda code: code >= 0)


@given(codes, codes)
def test_ranges_are_cut_where_older_compilers_misread_them(one: int, other: int) -> None:
    low, high = sorted((one, other))
    pieces = encoded(low, high)
    assert (pieces[0][0], pieces[-1][1]) == (low, high)
    assert all(first <= last for first, last in pieces)
    assert all(a[1] + 1 == b[0] for a, b in pairwise(pieces))
    for first, last in pieces:
        assert len(chr(first).encode("utf-8", "surrogatepass")) == len(
            chr(last).encode("utf-8", "surrogatepass")
        )
        assert last < 0x800 or last % 0x1000 == 0xFFF or first // 0x1000 == last // 0x1000


def test_what_stands_for_itself_in_a_string() -> None:
    assert character_class(PLAIN) == (
        r"[\U00000020-\U00000021\U00000023-\U0000005b\U0000005d-\U0000007f\U00000080-\U000007ff"
        r"\U00000800-\U0000cfff\U0000d000-\U0000d7ff\U0000e000-\U0000ffff\U00010000-\U0010ffff]"
    )
