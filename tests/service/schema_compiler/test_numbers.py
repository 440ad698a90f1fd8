"""Grammars of numbers against the judge of the benchmarks, which shares no code with the validator."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import pytest
import xgrammar
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import judge
from service.schema_compiler import jsontext
from service.schema_compiler.emit.rules import Rules
from service.schema_compiler.exact import text_of
from service.schema_compiler.normalize.constraints import Literal
from tests.service.schema_compiler.matching import Emitted, emit_number

_STOP = 256
_TABLE = [*(bytes([value]) for value in range(256)), b""]
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


@lru_cache(maxsize=1)
def _compiler() -> xgrammar.GrammarCompiler:
    info = xgrammar.TokenizerInfo(
        _TABLE, xgrammar.VocabType.RAW, vocab_size=len(_TABLE), stop_token_ids=[_STOP]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _literal(keyword: str, value: Any, negated: bool = False) -> Literal:
    """A keyword as it is read from a schema."""
    return Literal(keyword, jsontext.decode(json.dumps(value), exact=True), negated=negated)


def _literals(*keywords: dict[str, Any]) -> list[Literal]:
    """Literals of schemas with one keyword each; ``not`` negates."""
    found = []
    for schema in keywords:
        for keyword, value in schema.items():
            if keyword == "not":
                ((keyword, value),) = value.items()
                found.append(_literal(keyword, value, negated=True))
            else:
                found.append(_literal(keyword, value))
    return found


class _Language:
    """The numbers of a conjunction of keywords, by grammar and by judge."""

    def __init__(self, literals: Sequence[Literal]) -> None:
        rules = Rules()
        self.emitted: Emitted = emit_number(literals, rules)
        dropped = [literal for literal, _ in self.emitted.dropped]
        self.kept = [literal for literal in literals if literal not in dropped]
        keywords = [f'{{"{one.keyword}": {text_of(one.value)}}}' for one in self.kept]
        conjunction = [
            f'{{"not": {keyword}}}' if one.negated else keyword
            for one, keyword in zip(self.kept, keywords, strict=True)
        ]
        schema = f'{{"type": "number", "allOf": [{", ".join([*conjunction, "{}"])}]}}'
        self._validator, _ = judge.validators(judge.exact(schema))
        self.text = "" if self.emitted.expression is None else rules.text(self.emitted.expression)
        self._compiled = _compiler().compile_grammar(self.text) if self.text else None

    @property
    def reasons(self) -> list[str]:
        return [why for _, why in self.emitted.dropped]

    def valid(self, text: str) -> bool:
        """What the judge says of the number."""
        return bool(self._validator.is_valid(judge.exact(text)))

    def accepts(self, text: str) -> bool:
        if self._compiled is None:
            return False
        matcher = xgrammar.GrammarMatcher(self._compiled, terminate_without_stop_token=True)
        return bool(matcher.accept_string(text) and matcher.is_completed())

    def walk(self, chance: random.Random) -> str:
        """A text of the grammar, byte by byte; zeros and nines are likelier than others."""
        matcher = xgrammar.GrammarMatcher(self._compiled)
        mask = xgrammar.allocate_token_bitmask(1, len(_TABLE))
        text = b""
        while True:
            matcher.fill_next_token_bitmask(mask)
            words = mask.numpy().view("uint32")[0]
            allowed = [i for i in range(len(_TABLE)) if words[i // 32] >> (i % 32) & 1]
            if _STOP in allowed and (allowed == [_STOP] or chance.random() < 0.1):
                return text.decode()
            allowed = [i for i in allowed if i != _STOP]
            edges = [i for i in allowed if i in b"09"]
            token = chance.choice(edges if edges and chance.random() < 0.4 else allowed)
            assert matcher.accept_token(token)
            text += bytes([token])

    def check(self, texts: Sequence[str], chance: random.Random, walks: int = 3) -> None:
        """Everything of the grammar is valid, and every canonical text that is valid is there,
        unless fractional multiples or exclusions bound numbers to 15 digits."""
        for text in texts:
            accepted = self.accepts(text)
            if accepted or len(text.strip("-")) <= 15:
                assert accepted == self.valid(text), text
        for _ in range(walks if self.text else 0):
            text = self.walk(chance)
            assert self.valid(text), text


def _near(literals: Sequence[Literal]) -> Iterator[str]:
    """Canonical spellings of integers around everything that is written."""
    for literal in literals:
        values = literal.value if isinstance(literal.value, list) else [literal.value]
        for value in values:
            if isinstance(value, str) or abs(value) > 10**15:
                continue
            for factor in (-1, 1, 2):
                base = int(value * factor)
                yield from (str(base + step) for step in (-1, 0, 1))


_integers = st.one_of(
    st.integers(-30, 30), st.integers(-(10**6), 10**6), st.sampled_from([2**31, 2**53, -(2**63)])
)
_numbers = st.one_of(_integers, st.floats(-100, 100), st.decimals(-20, 20, places=2).map(float))
_steps = st.sampled_from(
    [1, 1.0, 2, 3, 4, 6, 7, 10, 25, 100, 0.5, 2.5, 3.0, 0.1, 0.01, 0.3, 1e-3, 97]
)
_bounds = st.lists(
    st.builds(_literal, st.sampled_from(_BOUNDS), _numbers, negated=st.booleans()), max_size=3
)
_multiples = st.lists(
    st.builds(_literal, st.just("multipleOf"), _steps, negated=st.booleans()), max_size=2
)
_excluded = st.lists(
    st.builds(_literal, st.just("enum"), st.lists(_numbers, max_size=3), negated=st.just(True)),
    max_size=1,
)
_conjunctions = st.tuples(_bounds, _multiples, _excluded).map(
    lambda parts: [*parts[0], *parts[1], *parts[2]]
)


@settings(max_examples=25, deadline=None)
@given(_conjunctions, st.lists(_integers, max_size=5), st.randoms(use_true_random=False))
@example(_literals({"minimum": 1}, {"not": {"enum": [16]}}), [112], random.Random(1))
@pytest.mark.slow
def test_integers(literals: list[Literal], more: list[int], chance: random.Random) -> None:
    language = _Language([Literal("type", "integer"), *literals])
    language.check([*_near(literals), *map(str, [*range(-12, 13), *more])], chance)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(_conjunctions, st.lists(_integers, max_size=5), st.randoms(use_true_random=False))
@example(_literals({"exclusiveMaximum": 0}), [-7], random.Random(1))
@example(_literals({"not": {"enum": [1e-141]}}), [0], random.Random(1))
def test_numbers(literals: list[Literal], more: list[int], chance: random.Random) -> None:
    language = _Language(literals)
    tenths = (str(n / 10) for n in range(-25, 26) if n)
    language.check([*_near(literals), *map(str, more), *tenths], chance)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(_conjunctions, st.randoms(use_true_random=False))
def test_numbers_that_are_no_integers(literals: list[Literal], chance: random.Random) -> None:
    language = _Language([Literal("type", "integer", negated=True), *literals])
    language.check([str(n / 4) for n in range(-25, 26) if n], chance)


@pytest.mark.parametrize("low", range(-4, 13, 4))
@pytest.mark.parametrize("size", [0, 1, 95, 120])
def test_small_intervals_of_integers_are_exact(low: int, size: int) -> None:
    literals = _literals({"type": "integer"}, {"minimum": low}, {"maximum": low + size})
    language = _Language(literals)
    for value in range(low - 12, low + size + 12):
        assert language.accepts(str(value)) == (low <= value <= low + size), value


@pytest.mark.parametrize("modulus", [2, 3, 7, 12, 30, 1000, 97])
@pytest.mark.parametrize("negated", [False, True])
def test_multiples_are_exact(modulus: int, negated: bool) -> None:
    bounds = _literals({"type": "integer"}, {"minimum": -40}, {"maximum": 1500})
    language = _Language([*bounds, Literal("multipleOf", modulus, negated=negated)])
    assert not language.reasons
    for value in range(-45, 1510, 3 if modulus == 1000 else 1):
        assert language.accepts(str(value)) == (
            -40 <= value <= 1500 and (value % modulus != 0) == negated
        ), value


@pytest.mark.parametrize(
    ("schemas", "accepted", "refused"),
    [
        ([{}], ["0", "-1", "1.50", "1e-05", "-2E+3", "0.0"], ["01", "+1", "1.", ".5", "1e", "NaN"]),
        ([{"type": "integer"}], ["0", "-12", "1" * 40], ["1.0", "1e2", "-", "00", "1" * 42]),
        ([{"minimum": 0}], ["0", "0.5", "1e-05", "1e16", "10.00"], ["-1", "-0.5"]),
        ([{"exclusiveMinimum": 0}], ["0.0001", "1e-05", "7"], ["0", "0.0", "0e5", "-1"]),
        ([{"minimum": 0}, {"maximum": 1}], ["1.0", "1", "0.999", "1e-05"], ["1.01", "2", "1e16"]),
        ([{"exclusiveMaximum": 1}], ["0.9999999999999999", "-3"], ["0.99999999999999999999", "1"]),
        ([{"minimum": 0.1}], ["0.1", "0.1000000000001", "1e+20"], ["0.0999", "1e-05"]),
        ([{"minimum": 3.5}, {"type": "integer"}], ["4", "10"], ["3", "0", "4.5"]),
        ([{"multipleOf": 1}], ["5", "5.0", "-5.00"], ["5.5", "0.1"]),
        ([{"multipleOf": 2.5}], ["2.5", "5", "5.0", "-7.50", "0"], ["1", "2.4", "2.55"]),
        ([{"not": {"multipleOf": 2.5}}], ["1", "2.4", "2.55"], ["2.5", "5", "0"]),
        (
            [{"not": {"enum": [1, "x", None, True]}}],
            ["10", "1.5", "-1", "0.9"],
            ["1", "1.0", "1.00"],
        ),
        ([{"not": {"enum": [True]}}], ["1", "1.0"], []),
        ([{"not": {"type": "integer"}}], ["0.5", "-3.14", "1e-05"], ["0", "2.0", "1e16"]),
        (
            [{"type": "integer"}, {"multipleOf": 1000}],
            ["0", "-1000", "123000"],
            ["100", "1001", "-0"],
        ),
        ([{"type": "integer"}, {"multipleOf": 0.01}], ["0", "7", "-12345"], ["0.01"]),
        ([{"minimum": 1.5e-30}], ["0.1", "1e+16"], ["0." + "0" * 29 + "1", "1e-05"]),
        ([{"minimum": 1e20}], ["1" * 21, "100000000000000000000.0"], ["1e+16", "9" * 20]),
        (
            [{"multipleOf": 3.0}, {"type": "integer"}],
            ["-3", "9007199254740993"],
            ["9007199254740994"],
        ),
        (
            [{"multipleOf": 0.01}],
            ["0.07", "-19.99", "8.2", "0", "1.500"],
            ["0.005", "1.001", "1e2"],
        ),
        (
            [{"multipleOf": 0.05}, {"exclusiveMinimum": 0}, {"maximum": 99.95}],
            ["0.05", "0.1", "99.95", "7"],
            ["0", "0.00", "0.04", "99.96", "100", "-0.05"],
        ),
        (
            [{"multipleOf": 0.25}, {"maximum": -0.3}],
            ["-0.5", "-0.75", "-3"],
            ["-0.25", "0", "-0.3"],
        ),
        ([{"multipleOf": 1e-8}], ["0.00000001", "-12.5"], ["0.000000001"]),
        ([{"multipleOf": 0.02}, {"multipleOf": 0.03}], ["0.06", "-1.2"], ["0.02", "0.03", "0.09"]),
        (
            [{"multipleOf": 1234.56}, {"minimum": 0}, {"maximum": 1e4}],
            ["0", "1234.56", "9876.48", "2469.120"[:-1]],
            ["1234.5", "11111.04"],
        ),
        ([{"not": {"multipleOf": 0.1}}], ["0.05", "1.01"], ["0.5", "7", "0.50"]),
        ([{"multipleOf": 0.1}, {"not": {"multipleOf": 0.5}}], ["0.1", "1.4"], ["0.5", "1", "0"]),
        ([{"not": {"enum": [0.1, 19.99]}}], ["0.11", "19.9"], ["0.1", "0.10", "19.990"]),
        ([{"maximum": 1e225}], ["1" * 40], ["9" * 31 + "e199"]),
        ([{"maximum": 1e308}, {"type": "integer"}], ["9" * 40], []),
    ],
)
def test_spellings(schemas: list[dict[str, Any]], accepted: list[str], refused: list[str]) -> None:
    language = _Language(_literals(*schemas))
    assert not language.reasons
    assert [text for text in accepted if not language.accepts(text)] == []
    assert [text for text in refused if language.accepts(text)] == []
    assert all(language.valid(text) for text in accepted)


@pytest.mark.parametrize(
    "schemas",
    [
        [{"minimum": 2}, {"maximum": 1}],
        [{"minimum": 1}, {"exclusiveMaximum": 1}],
        [{"type": "integer"}, {"exclusiveMinimum": 1}, {"exclusiveMaximum": 2}],
        [{"type": "integer"}, {"not": {"type": "integer"}}],
        [{"not": {"type": "integer"}}, {"multipleOf": 3}],
        [{"multipleOf": 6}, {"not": {"multipleOf": 3}}],
        [{"multipleOf": 2.5}, {"not": {"multipleOf": 0.5}}],
        [{"type": "integer"}, {"not": {"multipleOf": 0.5}}],
        [{"minimum": 7}, {"maximum": 7}, {"not": {"enum": [7.0]}}],
        [{"type": "integer"}, {"minimum": 7}, {"maximum": 9}, {"multipleOf": 5}],
        [{"type": "integer"}, {"minimum": 7}, {"maximum": 8}, {"not": {"enum": [7, 8]}}],
    ],
)
def test_nothing_satisfies_a_contradiction(schemas: list[dict[str, Any]]) -> None:
    assert emit_number(_literals(*schemas), Rules()) == Emitted(None)


@pytest.mark.parametrize(
    ("schemas", "keyword"),
    [
        ([{"multipleOf": 1234.567}], "multipleOf"),
        ([{"multipleOf": 1e-13}], "multipleOf"),
        ([{"multipleOf": 1e-300}, {"type": "integer"}], "multipleOf"),
        ([{"type": "integer"}, {"multipleOf": 9973}], "multipleOf"),
        ([{"minimum": 10**120}], "minimum"),
        ([{"maximum": -1e300}, {"type": "integer"}], "maximum"),
        ([{"not": {"enum": [10**120]}}], "enum"),
        ([{"minimum": 10**40}, {"not": {"type": "integer"}}, {"multipleOf": 1e-3}], "multipleOf"),
    ],
)
def test_what_cannot_be_written_is_left_to_the_validator(
    schemas: list[dict[str, Any]], keyword: str
) -> None:
    language = _Language(_literals(*schemas))
    assert keyword in [literal.keyword for literal, _ in language.emitted.dropped]
    assert all(language.reasons)
    assert language.text
    assert language.valid(language.walk(random.Random(3)))


def test_all_amounts_between_bounds_are_accepted_and_nothing_else() -> None:
    """Among them 0.07, of which binary64 says that it is 7.000000000000001 times 0.01."""
    language = _Language(_literals({"minimum": 0}, {"maximum": 2}, {"multipleOf": 0.01}))
    assert not language.reasons
    for count in range(2010):
        text = f"{count / 1000:.3f}"
        assert language.accepts(text) == (count % 10 == 0 and count <= 2000), text


_CURRENCY_STEPS = [0.01, 0.1, 0.05, 0.5, 0.25, 0.001, 0.00001, 2.5, 0.3, 12.5]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(_CURRENCY_STEPS),
    st.lists(st.integers(-(10**6), 10**6), max_size=2),
    st.lists(st.integers(-(10**9), 10**9), min_size=20, max_size=20),
    st.integers(0, 8),
    st.booleans(),
)
def test_the_grammar_accepts_exactly_the_multiples_between_bounds(
    step: float, bounds: list[int], others: list[int], places: int, is_open: bool
) -> None:
    """Numbers are counted in units of 10**-8, so that nothing here divides a fraction."""
    names = ("exclusiveMinimum", "exclusiveMaximum") if is_open else ("minimum", "maximum")
    limits = [limit * 10**5 for limit in sorted(bounds)]
    low, high = [*limits, -math.inf][0], [*limits[1:], math.inf][0]
    counted = round(step * 10**5) * 1000
    named = zip(names, limits, strict=False)
    language = _Language(
        [
            _literal("multipleOf", step),
            *(Literal(name, _from_units(limit)) for name, limit in named),
        ]
    )
    assert not language.reasons
    near = [counted * (limit // counted + n) for limit in limits for n in (-1, 0, 1, 2)]
    tried = [*near, *limits, *(n * counted for n in others), *(n * 10**places for n in others)]
    for value in tried:
        text = f"{_from_units(value):f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        if len(text) > 14:
            continue
        inside = low < value < high if is_open else low <= value <= high
        assert language.accepts(text) == (inside and value % counted == 0), text


def _from_units(value: int) -> Decimal:
    return Decimal(value).scaleb(-8)


def test_large_multiples_between_bounds_are_written_one_by_one() -> None:
    bounds = _literals({"type": "integer"}, {"minimum": -20000}, {"maximum": 20000})
    language = _Language([*bounds, Literal("multipleOf", 9973)])
    assert not language.reasons
    assert language.accepts("-19946")
    assert not language.accepts("9972")


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-1e99, max_value=1e99).filter(bool)
)
def test_a_bound_admits_itself_and_with_exclusion_the_next(value: float) -> None:
    closed = _Language([_literal("minimum", value), _literal("maximum", abs(value) + 1)])
    opened = _Language([_literal("exclusiveMinimum", value), _literal("maximum", abs(value) + 1)])
    text = json.dumps(value)
    assert not opened.accepts(text)
    if "e" not in text and len(text) < 30:
        assert closed.accepts(text)


def test_numbers_have_forty_digits() -> None:
    language = _Language(_literals({}))
    for digits in range(1, 44):
        assert language.accepts("7" * digits) is (digits <= 40)
        assert language.accepts("-3." + "1" * digits) is (digits <= 40)


def test_grammars_are_small() -> None:
    """They stand at every number of a schema."""
    for schemas, size in (
        ([{"type": "integer"}], 80),
        ([{}], 200),
        ([{"type": "integer"}, {"minimum": 0}, {"maximum": 4294967295}], 600),
        ([{"minimum": -180}, {"maximum": 180}], 400),
    ):
        rules = _Language(_literals(*schemas)).text.splitlines()
        shared = [rule for rule in rules if "_digits" in rule.partition(" ::= ")[0]]
        assert len(shared) in (0, 12)  # they are written once in a grammar
        assert sum(len(rule) for rule in rules if rule not in shared) < size
