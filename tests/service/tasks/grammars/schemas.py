"""Random schemas, values and texts for the tests of grammars of schemas."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import xgrammar
from hypothesis import strategies as st

NAMES = ("a", "b", "c", "ab")
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_PATTERNS = ("^a", "b$", "^[ab]+$", "c", "^(a|c)$", "^ab$")
_SCALARS = st.sampled_from((None, True, False, 0, 1, 2, -1, 3.5, 7, "", "a", "b", "ab", "cab", "é"))
_STOP = 256
_INFO = xgrammar.TokenizerInfo(
    [*(bytes((value,)) for value in range(256)), b""],
    xgrammar.VocabType.RAW,
    vocab_size=257,
    stop_token_ids=[_STOP],
)
_COMPILER = xgrammar.GrammarCompiler(_INFO, max_threads=1, cache_enabled=False)


def compiled(ebnf: str) -> xgrammar.CompiledGrammar:
    """A grammar over single bytes."""
    return _COMPILER.compile_grammar(ebnf)


def accepts(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
    """Whether a text is one of a grammar."""
    matcher = xgrammar.GrammarMatcher(grammar)
    return all(matcher.accept_token(byte) for byte in text.encode()) and bool(
        matcher.accept_token(_STOP)
    )


def accepts_value(grammar: xgrammar.CompiledGrammar, value: Any) -> bool:
    """Whether a value is one of a grammar, with the names of its objects in some order."""
    return any(
        accepts(grammar, json.dumps(one, ensure_ascii=False))
        for one in itertools.islice(orders(value), 200)
    )


def orders(value: Any) -> Iterator[Any]:
    """A value with the names of objects in all orders."""
    if isinstance(value, list):
        for items in itertools.product(*(list(orders(item)) for item in value)):
            yield list(items)
    elif isinstance(value, dict):
        parts = [[(key, one) for one in orders(member)] for key, member in value.items()]
        for pairs in itertools.product(*parts):
            for order in itertools.permutations(pairs):
                yield dict(order)
    else:
        yield value


def walk(grammar: xgrammar.CompiledGrammar, rng: random.Random, most: int = 400) -> str | None:
    """A random text of a grammar, or None where it gets too long."""
    matcher = xgrammar.GrammarMatcher(grammar)
    mask = np.zeros((1, 9), dtype=np.int32)
    text = bytearray()
    for _ in range(most):
        matcher.fill_next_token_bitmask(_tensor(mask))
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:257]
        choices = [int(i) for i in np.flatnonzero(bits)]
        assert choices, "no text goes on from here"
        token = _choice(choices, rng)
        assert matcher.accept_token(token)
        if token == _STOP:
            return text.decode()
        text.append(token)
    return None


def _tensor(mask: Any) -> Any:
    import torch

    return torch.from_numpy(mask)


def _choice(choices: list[int], rng: random.Random) -> int:
    """Closing is likely, so that texts end; letters of the schemas are, too."""
    liked = [c for c in choices if c == _STOP or chr(c) in '"]}']
    if liked and rng.random() < 0.5:
        return rng.choice(liked)
    known = [c for c in choices if c < 128 and chr(c) in 'abc017"{[,:- ]}']
    return rng.choice(known if known and rng.random() < 0.9 else choices)


def values(depth: int = 2) -> st.SearchStrategy[Any]:
    """Small JSON values."""
    return st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
        ),
        max_leaves=4,
    )


_COUNTS = st.integers(0, 3)


def _keywords(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    some = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)
    return {
        "type": st.sampled_from(_TYPES) | st.lists(st.sampled_from(_TYPES), min_size=1, max_size=3, unique=True),
        "enum": st.lists(values(), min_size=1, max_size=4),
        "const": values(),
        "minimum": st.sampled_from((-1, 0, 1, 2.5)),
        "maximum": st.sampled_from((0, 2, 3.5)),
        "exclusiveMinimum": st.sampled_from((-1, 0, 1)),
        "exclusiveMaximum": st.sampled_from((1, 3)),
        "multipleOf": st.sampled_from((1, 2, 0.5)),
        "minLength": _COUNTS,
        "maxLength": _COUNTS,
        "pattern": st.sampled_from(_PATTERNS),
        "properties": named,
        "patternProperties": st.dictionaries(st.sampled_from(_PATTERNS), inner, max_size=2),
        "additionalProperties": inner,
        "required": names,
        "minProperties": _COUNTS,
        "maxProperties": _COUNTS,
        "propertyNames": inner,
        "dependentRequired": st.dictionaries(st.sampled_from(NAMES), names, max_size=2),
        "dependentSchemas": st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
        "items": inner,
        "prefixItems": some,
        "minItems": _COUNTS,
        "maxItems": _COUNTS,
        "contains": inner,
        "minContains": _COUNTS,
        "maxContains": _COUNTS,
        "uniqueItems": st.booleans(),
        "allOf": some,
        "anyOf": some,
        "oneOf": some,
        "not": inner,
        "if": inner,
        "then": inner,
        "else": inner,
        "unevaluatedProperties": inner,
        "unevaluatedItems": inner,
        "$ref": st.sampled_from(("#/$defs/one", "#/$defs/two")),
        "title": st.just("a title"),
    }  # fmt: skip


def _object(inner: st.SearchStrategy[Any], without: frozenset[str]) -> st.SearchStrategy[Any]:
    keywords = {k: v for k, v in _keywords(inner).items() if k not in without}

    @st.composite
    def drawn(draw: st.DrawFn) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True))
        return {keyword: draw(keywords[keyword]) for keyword in chosen}

    return drawn()


def schemas(*, without: frozenset[str] = frozenset()) -> st.SearchStrategy[Any]:
    """Schemas of draft 2020-12 with any keywords, nested and referring to two definitions."""
    plain = _object(st.booleans(), without)
    nested = st.recursive(
        st.booleans() | plain, lambda inner: _object(inner, without), max_leaves=5
    )

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        schema = draw(nested)
        if isinstance(schema, dict) and "#/$defs/" in json.dumps(schema):
            schema["$defs"] = {"one": draw(nested), "two": draw(nested)}
        return schema

    return drawn()
