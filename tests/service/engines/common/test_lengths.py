"""Masks of grammars with limits beside them: random answers never end in a dead end, and fit."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from service.engines.common.grammar import GrammarCompiler, Matcher
from service.errors import InternalError
from service.schema_compiler.api import CompiledSchema, Options, analyse, compile_schema
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.report import Enforcement
from service.types import Grammar, GrammarKind
from tests.lmdeploy_ext.lengths.oracle import STOP, VOCABULARY


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(VOCABULARY, [STOP])


class Walker:
    """Writes answers to a schema."""

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, CompiledSchema):
            schema = compile_schema(
                json.dumps(schema), DEFAULT_LIMITS, Options(lengths_beside=True)
            )
        self.schema = schema
        kind = GrammarKind.JSON_SCHEMA
        grammar = Grammar(kind, schema.schema, ebnf=schema.grammar, lengths=schema.lengths)
        self.compiled = compiler().compile(grammar)

    def allows(self, text: bytes) -> bool:
        """Whether an answer can begin with a text."""
        matcher = Matcher(self.compiled, compiler())
        for byte in text:
            if byte not in allowed(matcher):
                return False
            matcher.accept(byte)
        return True

    def walk(self, rng: random.Random, steps: int) -> tuple[bytes, bool]:
        """A random answer, which goes on with strings as long as that is allowed in every other one;
        and whether it has come to its end."""
        matcher, text, eager = Matcher(self.compiled, compiler()), b"", rng.random() < 0.5
        for _ in range(steps):
            tokens = allowed(matcher)
            assert tokens, text
            longer = [one for one in tokens if b'"' not in VOCABULARY[one] and one != STOP]
            token = rng.choice(longer if eager and longer else tokens)
            if token == STOP:
                return text, True
            matcher.accept(token)
            text += VOCABULARY[token]
        return text, False


def allowed(matcher: Matcher) -> list[int]:
    bits = np.unpackbits(matcher._next_bits()[0].view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[: len(VOCABULARY)]).tolist()  # type: ignore[no-any-return]


def text(low: int, high: int) -> dict[str, Any]:
    return {"type": "string", "minLength": low, "maxLength": high}


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def pattern(source: str, **others: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": source, **others}


SCHEMAS = [
    text(0, 0),
    text(1, 1),
    text(70, 75),
    closed(a=text(0, 3), b={"type": "array", "items": text(2, 5), "minItems": 1, "maxItems": 3}),
    {"anyOf": [closed(k={"const": 1}, a=text(0, 2)), closed(k={"const": 2}, a=text(6, 90))]},
    {
        "type": "object",
        "properties": {"b": text(0, 2)},
        "additionalProperties": text(1, 3),
        "maxProperties": 3,
    },
    {**text(0, 2), "not": {"enum": ["ab", "", "a"]}},
    {"anyOf": [text(3, 4), {"enum": ["a", "abcdefgh"]}, {"type": "null"}]},
    closed(a={"type": "string", "pattern": "^[a-c]{2,4}$"}, b=text(65, 66)),
]
BESIDE = [
    pattern("^[a-z]{1,70}$"),
    pattern("^x[0-9a-z]{66,}$"),
    pattern("^[0-9a-z]{66}$"),
    pattern("^[a-z]+:[a-z]+:[a-z]+$", maxLength=70),
    pattern(r"^(?:\S+\s+){0,9}\S+$", maxLength=66),
    pattern('^(?:[^a"]+[a"][^b]b)+$', maxLength=67, minLength=3),
    pattern("^[a-z]+(?:,[a-z]+)*$", maxLength=66, **{"not": {"enum": ["de", "de,x"]}}),
    {"type": "string", "format": "email", "maxLength": 70},
    {
        "type": "object",
        "properties": {"id": text(0, 2), "idea": {"type": "null"}},
        "patternProperties": {"^[a-z]{1,66}$": text(0, 70)},
        "additionalProperties": False,
        "minProperties": 1,
    },
    {"type": "object", "propertyNames": {"maxLength": 66}, "additionalProperties": text(1, 70)},
    {
        "type": "object",
        "properties": {"": text(0, 66), "é": {"type": "integer"}},
        "propertyNames": {"maxLength": 66},
        "additionalProperties": {"type": "array", "items": pattern("^.+z$", maxLength=66)},
    },
]


@pytest.mark.parametrize("schema", [*SCHEMAS, *BESIDE], ids=lambda schema: json.dumps(schema)[:40])
@pytest.mark.slow
def test_answers_fit_and_can_always_go_on(schema: Any) -> None:
    answers_fit(schema, 60)


@pytest.mark.parametrize("schema", BESIDE, ids=lambda schema: json.dumps(schema)[:40])
@pytest.mark.long
def test_2000_answers_fit_and_can_always_go_on(schema: Any) -> None:
    answers_fit(schema, 2_000)


def answers_fit(schema: Any, walks: int) -> None:
    walker = Walker(schema)
    assert walker.schema.report.enforcement is Enforcement.ENFORCED
    assert walker.schema.lengths or schema not in BESIDE
    rng, ended = random.Random(1), 0
    for _ in range(walks):
        answer, complete = walker.walk(rng, 150)
        if complete:
            ended += 1
            value = json.loads(answer)
            assert jsonschema.Draft202012Validator(schema).is_valid(value), answer
    assert ended > walks // 12


def test_a_token_that_the_mask_forbids_is_a_defect() -> None:
    walker = Walker(text(0, 2))
    matcher = Matcher(walker.compiled, compiler())
    for byte in b'"ab':
        matcher.accept(byte)
    with pytest.raises(InternalError, match="limit"):
        matcher.accept(ord("c"))


def test_the_cache_tells_limits_apart() -> None:
    def key(high: int) -> tuple[str, bytes]:
        source = json.dumps(text(0, high))
        found = analyse(
            Grammar(GrammarKind.JSON_SCHEMA, source, lengths_beside=True), DEFAULT_LIMITS
        )
        return found.grammar.ebnf, found.grammar.lengths

    (short, one), (long, other) = key(70), key(80)
    assert short == long
    assert one != other
