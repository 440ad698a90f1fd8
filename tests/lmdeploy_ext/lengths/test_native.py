"""The library does what its definition in Python does: the same masks, the same places, the same ends."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from lmdeploy_ext.deepstack.library import LibraryUnavailable, find_compiler
from lmdeploy_ext.lengths.binding import native
from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from lmdeploy_ext.lengths.vocabulary import Vocabulary
from service.schema_compiler.api import Options, compile_schema
from service.schema_compiler.limits import DEFAULT_LIMITS
from tests.lmdeploy_ext.lengths.oracle import STOP, VOCABULARY, string_table

pytestmark = pytest.mark.slow  # compiles


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    try:
        find_compiler()
    except LibraryUnavailable as error:
        pytest.skip(str(error))


def text(low: int, high: int) -> dict[str, Any]:
    return {"type": "string", "minLength": low, "maxLength": high}


def table(schema: Any) -> Table:
    options = Options(lengths_beside=True)
    return Table(compile_schema(json.dumps(schema), DEFAULT_LIMITS, options).lengths)


TABLES = {
    "short": string_table(0, 2),
    "long": string_table(5, 300),
    "endless": string_table(3, None),
}
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"a": text(0, 3), "ab": text(2, 9), 'é"\\': text(1, 1)},
        "additionalProperties": text(0, 5),
    },
    "array": {
        "type": "array",
        "prefixItems": [text(0, 1), {"type": "array", "items": text(2, 4)}],
        "items": text(3, 5),
    },
    "tree": {
        "type": "object",
        "properties": {"name": text(0, 4), "below": {"type": "array", "items": {"$ref": "#"}}},
        "additionalProperties": False,
    },
    "patterns": {
        "type": "array",
        "prefixItems": [
            {"type": "string", "pattern": "^[a-z]+(?:,[^\\s]+)+$", "maxLength": 70},
            {"type": "string", "pattern": "^[0-9a-f]{66,}$"},
        ],
        "items": {"type": "string", "pattern": "^(?:[^a-z]+a[^b]b)+$", "maxLength": 66},
    },
    "addresses": {
        "type": "array",
        "items": {"type": "string", "format": "email", "maxLength": 70},
    },
    "names": {
        "type": "object",
        "patternProperties": {"^[a-z\\s]{1,66}$": text(0, 3)},
        "additionalProperties": False,
    },
}  # fmt: skip
BEGINNINGS = {
    "object": [b'{"a": "', b'{"ab": "', b'{"other": "', b"{"],
    "array": [b"[", b'["', b'["", ["', b'["", [], "'],
    "patterns": [
        b'["' + b"a" * 60 + b",",
        b'["a,b", "' + b"0" * 60,
        b'["a,b", "' + b"0" * 70 + b'", "' + b"aab" * 20,
        '["a,b", "", "aéb漢aéb", "'.encode() + 20 * 'a"b'.replace('"', '\\"').encode(),
    ],
    "addresses": [
        b'["' + b"a" * 60,
        b'["' + b"a" * 50,  # the widest token fits
        b'["' + b"a" * 59 + b"@",
        b'["\\"' + b"a" * 61,
        b'["a@b.ch", "' + b"a" * 20 + b"@" + b"b" * 40,
    ],
    "names": [b'{"' + b"a" * 60, b'{"ab": "x", "' + b"b" * 55 + b"\\n\\u00"],
    "tree": [b'{"name": "', b'{"name": "", "below": [{"name": "'],
}
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b", ",
    b": ",
    b'"',
    b'"a"',
    b'"ab": "',
    b'"name": "',
    b'"below": [',
    b"1.5e3",
    b"null",
]


def place(follower: Follower) -> tuple[int, ...]:
    depth, stack = 0, follower._stack
    while stack is not None:
        depth, stack = depth + 1, stack[1]
    return (follower.mode, follower.lex, follower.here, follower.left, follower.need, depth)


@pytest.mark.parametrize("name", [*TABLES, *SCHEMAS])
def test_random_tokens(name: str) -> None:
    limits = Table(TABLES[name]) if name in TABLES else table(SCHEMAS[name])
    words = -(-len(VOCABULARY) // 32)
    ours, theirs = Vocabulary(VOCABULARY), native().vocabulary(VOCABULARY).limits(limits)
    rng, masks, refused, places = random.Random(name), 0, 0, set()
    tokens = [index for index in range(STOP) if index < 256 or rng.random() < 0.9]
    for _ in range(150):
        follower, twin = Follower(limits), theirs.follower()
        begun = rng.choice(BEGINNINGS.get(name, [b'"']))
        assert follower.feed(begun)
        assert twin.feed(begun)
        for _ in range(60):
            mask = np.array([rng.getrandbits(32) for _ in range(words)], np.uint32).view(np.int32)
            other = mask.copy()
            ours.narrow_inplace(mask, follower)
            twin.narrow_inplace(other)
            assert (mask == other).all(), place(follower)
            masks += 1
            if rng.random() < 0.4:
                data = rng.choice(PIECES)
                fits, same = follower.fits(data), twin.feed(data)
            else:
                token = rng.choice(tokens)
                data = VOCABULARY[token]
                fits, same = follower.fits(data), twin.accept(token)
            assert fits == same, (place(follower), data)
            if not fits:
                refused += 1
                break
            follower.feed(data)
            assert place(follower) == twin.place(), data
            places.add((follower.mode, follower.lex))
    assert masks > 500
    assert refused > 5
    assert len(places) > 5


def test_deep_and_long() -> None:
    limits = table(SCHEMAS["tree"])
    follower, twin = Follower(limits), native().vocabulary(VOCABULARY).limits(limits).follower()
    deep = b'{"name": "abcd", "below": [' * 2000
    for data in (deep, b'{"name": "abcd"}', b"]}" * 1000, b', {"name": "'):
        assert follower.feed(data)
        assert twin.feed(data)
        assert place(follower) == twin.place()
    assert not twin.feed(b"12345")


def test_tokens_that_do_not_exist() -> None:
    twin = native().vocabulary(VOCABULARY).limits(Table(string_table(0, 2))).follower()
    assert not twin.accept(-1)
    assert not twin.accept(len(VOCABULARY))
    assert twin.accept(STOP)


def test_few_nodes_are_prepared_and_counted() -> None:
    """Over a large vocabulary, a small schema of many patterns would take seconds."""
    texts = [
        {"type": "string", "pattern": f"^[a-z]+@{i}[a-z]{{30}}$", "maxLength": 100 + i}
        for i in range(10)
    ]
    limits = table({"type": "array", "prefixItems": texts, "minItems": len(texts)})
    ours, native_limits = Vocabulary(VOCABULARY), native().vocabulary(VOCABULARY).limits(limits)
    assert 100 < native_limits.examined <= 128
    assert native_limits.size_bytes > 4 * len(limits.numbers)
    for done, last in ((0, b"a" * 67), (9, b"a" * 76)):  # with rows, and without
        text = b"[" + b"".join(b'"a@%d%s", ' % (i, b"b" * 30) for i in range(done)) + b'"' + last
        follower, twin = Follower(limits), native_limits.follower()
        assert follower.feed(text)
        assert twin.feed(text)
        mask = np.full(-(-len(VOCABULARY) // 32), -1, np.int32)
        other = mask.copy()
        ours.narrow_inplace(mask, follower)
        twin.narrow_inplace(other)
        assert (mask == other).all()
        assert (mask != -1).any()
