"""The follower and the masks of `lmdeploy_ext.lengths`, compared with a parser of unfinished JSON."""

from __future__ import annotations

import codecs
import functools
import itertools
import random
import struct
from typing import Any

import numpy as np
import pytest

from lmdeploy_ext.lengths.follower import Follower, Mode
from lmdeploy_ext.lengths.table import Table, TableError
from lmdeploy_ext.lengths.vocabulary import Vocabulary
from tests.lmdeploy_ext.lengths.oracle import (
    STOP,
    UNLIMITED,
    VOCABULARY,
    string_table,
    strings,
    table,
)


def full() -> np.ndarray:
    return np.full(-(-len(VOCABULARY) // 32), -1, np.int32)


def allowed(words: np.ndarray) -> list[int]:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(VOCABULARY)]
    return np.flatnonzero(bits).tolist()


GRAMMAR = r"""
string ::= "\"" char* "\""
char ::= [^"\\\x00-\x1f] | "\\" ["\\/bfnrt] | "\\u" code
code ::= [0-9a-cA-CefEF] hex hex hex | [dD] [0-7] hex hex | [dD] [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex
hex ::= [0-9a-fA-F]
"""


def is_utf8(text: bytes) -> bool:
    """Whether a text in UTF-8 can begin like this; xgrammar allows a little more."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return text[-2:-1] != b"\xed" or text[-1:] < b"\xa0"  # half of a pair of surrogates


@functools.cache
def compiled(root: str) -> Any:
    import xgrammar

    info = xgrammar.TokenizerInfo(VOCABULARY, vocab_size=len(VOCABULARY), stop_token_ids=[STOP])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    return compiler.compile_grammar(f"root ::= {root}\n{GRAMMAR}")


BOUNDS = [(0, 0), (0, 1), (0, 2), (1, 1), (2, 5), (3, None), (0, 9), (6, 40), (0, None), (40, 41)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("answer", ["string", "array"])
@pytest.mark.slow
def test_masks_are_those_of_a_parser(low: int, high: int | None, answer: str) -> None:
    import xgrammar

    in_array = answer == "array"
    most = UNLIMITED if high is None else high
    limits = Table(table((low, most, -1, 0, [], 2), (low, most, -1, 0, [], 2)))
    automaton = compiled('"[" (string (", " string)*)? "]"' if in_array else "string")
    vocabulary, rng = Vocabulary(VOCABULARY), random.Random(f"{low} {high}")
    ended = 0
    for walk in range(16):
        matcher, follower, text = xgrammar.GrammarMatcher(automaton), Follower(limits), b""
        for _ in range(60):
            grammar = full()
            matcher.fill_next_token_bitmask(grammar.reshape(1, -1))
            words = grammar.copy()
            vocabulary.narrow_inplace(words, follower)
            possible = [i for i in allowed(grammar) if is_utf8(text + VOCABULARY[i])]
            fitting = [
                index for index in possible
                if all(count <= most and (count >= low or not closed)
                       for count, closed in strings(text + VOCABULARY[index]))
            ]  # fmt: skip
            assert [i for i in allowed(words) if i in possible] == fitting, text
            assert fitting, text
            # Every other walk goes on with a string as long as that is possible.
            going_on = [
                index for index in fitting if b'"' not in VOCABULARY[index] and index != STOP
            ]
            token = rng.choice(going_on if walk % 2 and going_on else fitting)
            if token == STOP:
                ended += 1
                break
            assert matcher.accept_token(token)
            assert follower.feed(VOCABULARY[token])
            text += VOCABULARY[token]
    assert ended or high is None or in_array


@pytest.mark.parametrize(
    "unit", [b"a", "é".encode(), "😀".encode(), b"\\n", b"\\u00e9", b"\\ud83d\\ude00"]
)
@pytest.mark.slow
def test_every_maximum_up_to_2000(unit: bytes) -> None:
    for high in range(0, 2001, 1 if unit == b"a" else 80):
        follower = Follower(Table(string_table(0, high)))
        assert follower.feed(b'"' + unit * high)
        assert not follower.fits(unit)
        assert follower.feed(b'"')
        assert follower.mode is Mode.OUTSIDE


@pytest.mark.slow
def test_every_minimum_up_to_2000() -> None:
    for low in range(2001):
        follower = Follower(Table(string_table(low, None)))
        assert follower.feed(b'"' + b"a" * low)
        assert follower.fits(b'"')
        assert low == 0 or not Follower(Table(string_table(low, None))).feed(
            b'"' + b"a" * (low - 1) + b'"'
        )


def test_names_lead_to_their_limits() -> None:
    # {"a": 1 character, "ab": 2, others: 3}; the tree of names has nodes 0 -a-> 1 -b-> 2.
    free = (-1, 0, UNLIMITED)
    rows = [(0, UNLIMITED, *free, -1, 0, 0, 0, 0), (0, UNLIMITED, *free, 0, 4, 0, 0, 0)]
    rows += [(0, count, *free, -1, 0, 0, 0, 0) for count in (1, 2, 3)]
    nodes = [(0, 2, -1, 0), (2, 2, 2, 0), (4, 0, 3, 0)]
    edges = [(ord("a"), 1), (ord("b"), -1), (ord("b"), 2), (ord("c"), -1)]
    numbers = [2, len(rows), len(nodes), len(edges), 0, 1, 1]
    numbers += [*itertools.chain(*rows, *nodes, *edges)]
    limits = Table(struct.pack(f"<{len(numbers)}i", *numbers))
    for name, most in {"a": 1, "ab": 2, "b": 3, "abc": 3, 'a\\"': 3, "": 3}.items():
        for first in ("{", '{"z": {"a": "xyz and more", "b": ["more than that"]}, '):
            follower = Follower(limits)
            assert follower.feed(f'{first}"{name}": "'.encode() + b"x" * most), (name, first)
            assert not follower.fits(b"x")


def test_items_lead_to_their_limits() -> None:
    states = [(0, UNLIMITED, -1, 0, [2, 3], 4), *((0, n, -1, 0, [], 0) for n in (1, 2, 3))]
    limits = Table(table(*states))  # type: ignore[arg-type]
    assert Follower(limits).feed(b'["1", "22", "333", "333"]')
    for text in (b'["11', b'["1", "222', b'["", "", "4444', b'["", ["x", "x", "x"], "", "4444'):
        assert not Follower(limits).feed(text), text
    assert Follower(limits).feed(
        b'[["free", "free"], "22", 1.5e3, true, null, {"a": "free"}, "333"]'
    )


def test_tables_that_do_not_fit_are_refused() -> None:
    good = string_table(1, 5)
    Table(good)
    numbers = list(struct.unpack(f"<{len(good) // 4}i", good))
    for at, wrong in [
        (0, 1),
        (1, 3),
        (1, -1),
        (2, 1),
        (5, 2),
        (5, -1),
        (17, -1),  # the first row begins at 7, the second at 17: a minimum
        (19, 0),  # a node of texts
        (20, -1),  # a reserve
        (20, 1),  # with which fewer characters fit than the header says
        (21, 4),  # a maximum of names, too
        (22, 0),  # a node of names
        (23, 2),  # a state
        (25, 1),  # items
    ]:
        broken = [*numbers[:at], wrong, *numbers[at + 1 :]]
        with pytest.raises(TableError):
            Table(struct.pack(f"<{len(broken)}i", *broken))
    for data in (b"", good[:-1], good[:-4], good + b"\0\0\0\0"):
        with pytest.raises(TableError):
            Table(data)


def text_table(nodes: list[tuple[int, int, int, int]], edges: list[tuple[int, int]]) -> bytes:
    """The limits of a string of up to 7 characters, of which the end may need 5."""
    rows = [
        (0, UNLIMITED, -1, 0, UNLIMITED, -1, 0, 0, 0, 0),
        (0, 7, 0, 5, UNLIMITED, -1, 0, 0, 0, 0),
    ]
    header = [2, len(rows), len(nodes), len(edges), 0, 1, 2]
    numbers = [*header, *itertools.chain(*rows, *nodes, *edges)]
    return struct.pack(f"<{len(numbers)}i", *numbers)


def test_edges_that_overlap_or_fall_are_refused() -> None:
    """They could take more memory than there is, and lead to different masks here and in C."""
    edges = [(ord("a"), 0), (ord("b"), -1)]
    Table(text_table([(0, 2, -1, 3), (2, 0, -1, 0)], edges))
    for nodes, wrong in [
        ([(0, 2, -1, 3), (0, 2, -1, 0)], edges),
        ([(0, 2, -1, 3)], edges[::-1]),
        ([(0, 2, -1, 3)], [edges[0]] * 2),
    ]:
        with pytest.raises(TableError):
            Table(text_table(nodes, wrong))


@pytest.mark.parametrize("edges", [[], [(ord("a"), 0)], [(ord("a"), 0), (ord("b"), -1)]])
def test_texts_are_followed_at_once_as_one_by_one(edges: list[tuple[int, int]]) -> None:
    limits = Table(text_table([(0, len(edges), -1, 3)], edges))
    for begun in (b'"', b'"a', b'"aaa'):
        follower, words = Follower(limits), full()
        follower.feed(begun)
        Vocabulary(VOCABULARY).narrow_inplace(words, follower)
        one_by_one = [i for i, token in enumerate(VOCABULARY) if follower.fits(token)]
        assert allowed(words) == one_by_one, begun
