"""Schemas too large for an exact grammar: looser ones, reported as such, the same on every machine."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from service.schema_compiler import api
from service.schema_compiler.api import analyse
from service.schema_compiler.budget import Budget, BudgetExceeded
from service.schema_compiler.emit.cost import MAX_COST, cost
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.lower.additional_names import OVERLAP
from service.schema_compiler.normalize import bounds
from service.schema_compiler.report import Analysed, Enforcement
from service.types import Grammar, GrammarKind
from tests.service.schema_compiler import schemas

LARGE = SchemaLimits(max_bytes=1 << 20)


def analysed(schema: Any) -> Analysed:
    api._CACHE.clear()
    return analyse(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)), LARGE)


def closed(count: int, value: Any) -> dict[str, Any]:
    names = [f"n{i}" for i in range(count)]
    return {
        "type": "object",
        "properties": dict.fromkeys(names, value),
        "required": names,
        "additionalProperties": False,
    }


def enforcement(found: Analysed) -> dict[str, Enforcement]:
    return {one.pointer: one.enforcement for one in found.report.keywords}


def accepts(found: Analysed, value: Any) -> bool:
    return schemas.accepts_value(schemas.compiled(found.grammar.ebnf), value)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that small schemas meet."""
    ladder = (
        replace(bounds.EXACT, members=60, effort=100),
        replace(bounds.NARROW, members=30, effort=200),
        replace(bounds.LOOSE, members=10),
    )
    monkeypatch.setattr(api, "LADDER", ladder)


@pytest.mark.usefixtures("narrow")
def test_an_object_of_too_many_members_is_any_object() -> None:
    found = analysed(closed(2, closed(40, {"maximum": 7})))
    assert accepts(found, {"n0": {}, "n1": {"any": "thing"}})
    assert not accepts(found, {"n0": 1, "n1": {}})
    assert not accepts(found, {"n1": {}})
    kept = enforcement(found)
    assert kept["/properties"] is kept["/required"] is Enforcement.ENFORCED
    for keyword in ("properties", "required", "additionalProperties", "properties/n5/maximum"):
        assert kept[f"/properties/n0/{keyword}"] is Enforcement.CHECKED, keyword
    assert all(one.why for one in found.report.checked)


@pytest.mark.usefixtures("narrow")
def test_an_object_of_too_many_patterns_is_any_object() -> None:
    names = {f"^a{i}": {"maximum": i} for i in range(40)}
    found = analysed(closed(1, {"patternProperties": names, "type": "object"}))
    assert accepts(found, {"n0": {"a39": "any"}})
    assert not accepts(found, {"n0": 1})
    (why,) = (one.why for one in found.report.checked if one.keyword == "patternProperties")
    assert why.startswith(bounds.BEYOND)


@pytest.mark.usefixtures("narrow")
def test_what_is_near_the_root_is_kept() -> None:
    inner = {"type": "object", "properties": {f"p{j}": {"const": j} for j in range(9)}}
    found = analysed(closed(9, inner | {"additionalProperties": False}))
    kept = enforcement(found)
    assert kept["/required"] is Enforcement.ENFORCED
    assert kept["/properties/n0/type"] is Enforcement.ENFORCED
    assert kept["/properties/n0/properties"] is Enforcement.ENFORCED
    assert kept["/properties/n8/properties"] is Enforcement.CHECKED
    assert kept["/properties/n8/properties/p3/const"] is Enforcement.CHECKED
    accepted = {f"n{i}": {} for i in range(9)}
    assert accepts(found, accepted | {"n8": {"p3": "not 3"}})
    assert not accepts(found, accepted | {"n0": {"p3": "not 3"}})


@pytest.mark.usefixtures("narrow")
def test_arrays_of_too_many_places_are_any_arrays() -> None:
    found = analysed({"prefixItems": [{"const": i} for i in range(70)], "uniqueItems": True})
    assert accepts(found, ["any", "thing"])
    assert accepts(found, {})
    kept = enforcement(found)
    assert kept["/prefixItems"] is kept["/uniqueItems"] is Enforcement.CHECKED
    assert kept["/prefixItems/9/const"] is Enforcement.CHECKED


@pytest.mark.usefixtures("narrow")
def test_patterns_that_take_much_are_dropped() -> None:
    places = {f"n{i}": {"pattern": f"^(x|y)*x(x|y){{{i}}}$"} for i in range(4)}
    found = analysed({"properties": places, "additionalProperties": False})
    kept = enforcement(found)
    assert kept["/properties/n0/pattern"] is Enforcement.ENFORCED
    assert kept["/properties/n3/pattern"] is Enforcement.CHECKED
    assert accepts(found, {"n0": "yx", "n3": "anything"})
    assert not accepts(found, {"n0": "anything"})


def test_names_with_too_many_patterns_may_be_all_that_is_asked_for() -> None:
    asked = [{"not": {"patternProperties": {one: False}}} for one in "cdf"]
    listed = [{"patternProperties": {one: True}, "additionalProperties": False} for one in "ab"]
    short = {"patternProperties": {"^.{1,3}$": False}}
    found = analysed({"type": "object", "maxProperties": 1, "allOf": [short, *listed, *asked]})
    assert accepts(found, {"abcdf": 1})
    assert {one.why for one in found.report.checked} == {OVERLAP}


@pytest.mark.slow
def test_the_same_grammar_each_time() -> None:
    schema = {"oneOf": [
        {"properties": {f"k{i}": {"type": "integer"}}, "required": [f"k{i}"]} for i in range(12)
    ]}  # fmt: skip
    first, second = analysed(schema), analysed(schema)
    assert first.grammar.ebnf == second.grammar.ebnf
    assert cost(first.grammar.ebnf) <= MAX_COST
    assert accepts(first, {"k3": 1})


def test_a_budget_counts_work_and_no_waiting() -> None:
    budget = Budget(seconds=0.02)
    time.sleep(0.03)
    budget.check()
    assert budget.part(1.0).seconds > 0.01
    begun = time.thread_time()
    while time.thread_time() - begun < 0.02:
        pass
    with pytest.raises(BudgetExceeded):
        budget.check()


def test_anything_where_nothing_else_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_COST", -1)
    found = analysed(closed(1, {"type": "integer"}))
    assert accepts(found, [None, {"a": 1.5}])
    kept = enforcement(found)
    assert set(kept.values()) == {Enforcement.CHECKED}
    assert "/properties/n0/type" in kept


@pytest.mark.slow
def test_two_thousand_places() -> None:
    found = analysed(
        {"type": "array", "prefixItems": [{"const": i} for i in range(2000)], "items": False}
    )
    assert accepts(found, [0, 1, 2])
    assert not accepts(found, [0, 2])
    assert found.report.enforcement is Enforcement.ENFORCED


@pytest.mark.parametrize(
    ("body", "states"),
    [
        ('x | "a" y | "ab" y | "abd" y | "c"', 4),
        ('"abc" [0-9]', 4),
        ('"\\U00000022a"', 2),
        ("[a]{3,5}", 6),
        ("[a]{7}", 8),
        ("[a]{2,}", 3),
    ],
)
def test_cost_counts_states(body: str, states: int) -> None:
    lines = "".join(f"rule_{i} ::= {body}\n" for i in range(5000))
    repeats = 5000 * (states - 1 if "{" in body else 0)
    assert cost(lines) == int(5000 * states * (8 + (5000 + repeats) * 0.006))


def test_small_grammars_cost_nothing() -> None:
    assert cost('root ::= "a"\n') == 0
