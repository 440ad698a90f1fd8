"""Random schemas, values and texts for the tests of grammars of schemas."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np
import xgrammar
from hypothesis import strategies as st

from lmdeploy_ext.lengths.follower import Follower
from lmdeploy_ext.lengths.table import Table
from lmdeploy_ext.lengths.vocabulary import Vocabulary

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
_VOCABULARY = Vocabulary([*(bytes((value,)) for value in range(256)), b""])
_COMPILER = xgrammar.GrammarCompiler(_INFO, max_threads=1, cache_enabled=False)


@lru_cache(maxsize=8)
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
    return any(accepts(grammar, json.dumps(one, ensure_ascii=False)) for one in some_orders(value))


def some_orders(value: Any) -> Iterator[Any]:
    """A value with the names of objects in all orders, unless there are very many."""
    return itertools.islice(orders(value), 200)


def orders(value: Any) -> Iterator[Any]:
    """A value with the names of objects in all orders, the parts in some."""
    if isinstance(value, list):
        for items in itertools.product(*(list(some_orders(item)) for item in value)):
            yield list(items)
    elif isinstance(value, dict):
        parts = [[(key, one) for one in some_orders(member)] for key, member in value.items()]
        for pairs in itertools.product(*parts):
            for order in itertools.permutations(pairs):
                yield dict(order)
    else:
        yield value


def walk(
    grammar: xgrammar.CompiledGrammar, rng: random.Random, most: int = 400, lengths: bytes = b""
) -> str | None:
    """A random text of a grammar, or None where it gets too long. lengths: the table of the limits beside
    the grammar, if any."""
    matcher = xgrammar.GrammarMatcher(grammar)
    follower = Follower(Table(lengths)) if lengths else None
    mask = np.zeros((1, 9), dtype=np.int32)
    text = bytearray()
    for _ in range(most):
        matcher.fill_next_token_bitmask(_tensor(mask))
        if follower is not None:
            _VOCABULARY.narrow_inplace(mask[0], follower)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:257]
        choices = [int(i) for i in np.flatnonzero(bits)]
        assert choices, "no text goes on from here"
        token = _choice(choices, rng)
        assert matcher.accept_token(token)
        if token == _STOP:
            return text.decode()
        if follower is not None:
            assert follower.feed(bytes([token]))
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


@cache
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
FAMILIES = ("object", "array", "string", "number")
"""Most keywords concern one type of value; those of a schema are drawn for one."""


@cache
def families(family: str) -> st.SearchStrategy[Any]:
    """Values of a family, with parts of any."""
    if family == "object":
        return st.dictionaries(st.sampled_from(NAMES), values(), max_size=3)
    if family == "array":
        return st.lists(values(), max_size=4)
    if family == "string":
        return st.text("abc", max_size=4)
    return st.integers(-2, 8) | st.sampled_from((0.5, 2.5, 3.25, 0.07, 1.1, 0.29))


@cache
def _of_family(family: str, inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)
    if family == "object":
        return {
            "properties": named,
            "patternProperties": st.dictionaries(st.sampled_from(_PATTERNS), inner, max_size=2),
            "additionalProperties": st.just(False) | inner,
            "required": names,
            "minProperties": _COUNTS,
            "maxProperties": _COUNTS,
            "propertyNames": _scalar("string"),
            "dependentRequired": st.dictionaries(st.sampled_from(NAMES), names, max_size=2),
            "dependentSchemas": st.dictionaries(st.sampled_from(NAMES), inner, max_size=2),
            "unevaluatedProperties": st.just(False) | inner,
        }
    if family == "array":
        return {
            "items": st.just(False) | inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=3),
            "minItems": _COUNTS,
            "maxItems": _COUNTS,
            "contains": inner,
            "minContains": _COUNTS,
            "maxContains": _COUNTS,
            "uniqueItems": st.booleans(),
            "unevaluatedItems": st.just(False) | inner,
        }
    if family == "string":
        return {
            "minLength": _COUNTS,
            "maxLength": _COUNTS,
            "pattern": st.sampled_from(_PATTERNS),
        }
    return {
        "minimum": st.sampled_from((-1, 0, 1, 2.5)),
        "maximum": st.sampled_from((0, 2, 3.5)),
        "exclusiveMinimum": st.sampled_from((-1, 0, 1)),
        "exclusiveMaximum": st.sampled_from((1, 3)),
        "multipleOf": st.sampled_from((1, 2, 0.5, 0.1, 0.01)),
    }


@st.composite
def _drawn(
    draw: st.DrawFn, keywords: dict[str, st.SearchStrategy[Any]], least: int = 0
) -> dict[str, Any]:
    chosen = draw(
        st.lists(st.sampled_from(sorted(keywords)), min_size=least, max_size=3, unique=True)
    )
    return {keyword: draw(keywords[keyword]) for keyword in chosen}


@cache
def _scalar(family: str) -> st.SearchStrategy[Any]:
    return _drawn(_of_family(family, st.nothing()), least=1) | st.builds(
        lambda names: {"enum": names}, st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)
    )


@cache
def _leaf() -> st.SearchStrategy[Any]:
    types = st.sampled_from(_TYPES)
    return st.one_of(
        st.booleans(),
        st.builds(lambda name: {"type": name}, types),
        st.builds(lambda listed: {"enum": listed}, st.lists(values(), min_size=1, max_size=4)),
        st.builds(lambda value: {"const": value}, values()),
        st.sampled_from(({"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}, {"$ref": "#"})),
        _scalar("string"),
        _scalar("number"),
    )


@cache
def schema_of(
    family: str, inner: st.SearchStrategy[Any], depth: int = 1
) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas with keywords of a family, and with branches of the same."""
    own = dict(_of_family(family, inner))
    own["enum"] = st.lists(families(family) | values(), min_size=1, max_size=4)
    own["type"] = st.sampled_from((family, "integer" if family == "number" else family))
    if depth:
        branch = schema_of(family, inner, depth - 1) | _leaf()
        some = st.lists(branch, min_size=1, max_size=3)
        condition = st.fixed_dictionaries({"if": branch}, optional={"then": branch, "else": branch})
        own |= {"allOf": some, "anyOf": some, "oneOf": some, "not": branch, "if": condition}
    return _drawn(own, least=1).map(_unfolded)


def _unfolded(schema: dict[str, Any]) -> dict[str, Any]:
    condition = schema.pop("if", {})
    return {**schema, **condition}


@cache
def schemas(family: str) -> st.SearchStrategy[Any]:
    """Schemas of draft 2020-12 for values of a family, nested, with references to two definitions
    and to themselves."""
    nested = st.recursive(
        _leaf(),
        lambda inner: st.sampled_from(FAMILIES).flatmap(lambda one: schema_of(one, inner)),
        max_leaves=3,
    )

    whole, part = schema_of(family, nested, 2), schema_of(family, nested)

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        schema = draw(whole)
        if "#/$defs/" in json.dumps(schema):
            schema["$defs"] = {"one": draw(_leaf()), "two": draw(part)}
        return schema

    return drawn()
