"""The order of properties, and additional names that must not garble declared ones."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.context import MAX_ORDER_RULES
from service.schema_compiler.lower.objects import MAX_UNORDERED
from service.schema_compiler.report import Enforcement, KeywordReport
from service.structured_output import wire
from service.types import Grammar, GrammarKind, PropertyOrder
from tests.service.schema_compiler import schemas

pytestmark = pytest.mark.slow

DECLARED, ANY = PropertyOrder.DECLARED, PropertyOrder.ANY
RECEIPT = ("total", "date", "vendor", "tax")


def reports(schema: Any, order: PropertyOrder) -> dict[str, KeywordReport]:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), property_order=order)
    return {one.pointer: one for one in analyse(grammar, DEFAULT_LIMITS).report.keywords}


def accepts(schema: Any, text: str, order: PropertyOrder = DECLARED) -> bool:
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), property_order=order)
    ebnf = analyse(grammar, DEFAULT_LIMITS).grammar.ebnf
    return schemas.accepts(schemas.compiled(ebnf), text)


def begins(schema: Any, text: str, order: PropertyOrder = DECLARED) -> bool:
    """Whether an answer may begin with the text."""
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), property_order=order)
    compiled = schemas.compiled(analyse(grammar, DEFAULT_LIMITS).grammar.ebnf)
    matcher = schemas.xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text.encode())


def an_object(names: Sequence[str], **keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {n: {"type": "integer"} for n in names}, **keywords}


def text_of(names: Sequence[str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: 1" for name in names) + "}"


# Order


@pytest.mark.parametrize("count", [2, 3, 4, MAX_UNORDERED])
@pytest.mark.parametrize("is_open", [False, True])
def test_the_order_of_few_names(count: int, is_open: bool) -> None:
    names = [f"{letter}name" for letter in "qwertyuiop"[:count]]
    schema = an_object(names, additionalProperties=is_open, required=names[-1:])
    shuffled = names[::-1]
    for order in PropertyOrder:
        assert accepts(schema, text_of(names), order)
        assert accepts(schema, text_of(names[1:]), order)
        assert accepts(schema, text_of(shuffled), order) == (order is ANY)
        assert not accepts(schema, text_of(names[:-1]), order), "the required one"
        assert not accepts(schema, text_of([*names, names[-1]]), order), "twice"
        assert accepts(schema, text_of(["x", *names, "y"]), order) == is_open
    assert not accepts(schema, text_of(shuffled)), "the default"


def test_required_names_in_another_order_are_no_order() -> None:
    names = ["a_reason", "b_label", "c_place", "d_score"]
    schema = an_object(names, required=["b_label", "a_reason"])
    assert accepts(schema, text_of(names[:2]))
    assert not accepts(schema, text_of(["b_label", "a_reason"]))


def test_the_declared_order_beyond_the_bound_is_reported() -> None:
    names = [f"{letter}name" for letter in "qwertyuiop"[: MAX_UNORDERED + 1]]
    inner = an_object(names, additionalProperties=False)
    schema = {"type": "object", "properties": {"one": inner, "two": an_object(["a", "b"])}}
    found = reports(schema, ANY)
    report = found["/properties/one/properties"]
    assert report.enforcement is Enforcement.ENFORCED
    assert report.why == "in the declared order: 9 names, any order is for up to 8"
    assert [at for at, one in found.items() if "order" in one.why] == [report.pointer]
    assert not any("order" in one.why for one in reports(schema, DECLARED).values())
    assert accepts(
        schema, json.dumps({"two": {"b": 1, "a": 1}, "one": dict.fromkeys(names, 1)}), ANY
    )
    assert not accepts(schema, json.dumps({"one": dict.fromkeys(names[::-1], 1)}), ANY)


@pytest.mark.parametrize("keywords", [{"minProperties": 2}, {"maxProperties": 2}])
def test_the_declared_order_of_counted_members_is_reported(keywords: dict[str, Any]) -> None:
    schema = an_object(["a", "b", "c"], additionalProperties=False, **keywords)
    why = reports(schema, ANY)["/properties"].why
    assert why == "in the declared order: members are counted"
    assert accepts(schema, text_of("ac"), ANY)
    assert not accepts(schema, text_of("ca"), ANY)


def test_many_objects_share_what_any_order_may_cost() -> None:
    each = [f"{letter}name" for letter in "qwertyui"]
    count = MAX_ORDER_RULES // 2 ** len(each) + 2
    schema = {
        "type": "array",
        "prefixItems": [
            an_object([f"{name}{i}" for name in each], additionalProperties=False)
            for i in range(count)
        ],
    }
    found = reports(schema, ANY)
    whys = [found[f"/prefixItems/{i}/properties"].why for i in range(count)]
    assert whys[0] == ""
    assert whys[-1] == (
        "in the declared order: the schema is too large for any order in all of its objects"
    )
    first = {f"{name}0": 1 for name in reversed(each)}
    assert accepts(schema, json.dumps([first]), ANY)
    assert not any(
        one.enforcement is Enforcement.CHECKED for one in found.values() if "name" in one.pointer
    )


def test_any_order_never_weakens_a_schema() -> None:
    """A schema that any order would make too costly keeps all of its keywords, in the declared one."""
    names = [f"property_of_a_long_name_{letter}" for letter in "qwertyui"]
    value = {"type": "string", "pattern": "^[a-z]+(-[a-z]+)*$", "maxLength": 30}
    parts = {
        f"part_{i}": {
            "type": "object",
            "properties": {f"{name}_{i}_{k}": value for k, name in enumerate(names)},
        }
        for i in range(60)
    }
    schema = {"type": "object", "properties": parts, "additionalProperties": False}
    declared, any_order = reports(schema, DECLARED), reports(schema, ANY)
    assert {at: one.enforcement for at, one in declared.items()} == {
        at: one.enforcement for at, one in any_order.items()
    }


def test_the_order_is_part_of_what_is_asked() -> None:
    for order in (None, *PropertyOrder):
        grammar = Grammar(GrammarKind.JSON_SCHEMA, "{}", property_order=order)
        request = json.loads(json.dumps(wire.write_request(grammar, DEFAULT_LIMITS, 1.0)))
        assert wire.read_request(request)[0] == grammar
    found = {analyse(g, DEFAULT_LIMITS).grammar.ebnf for g in _of_all_orders(an_object("abc"))}
    assert len(found) == 2


def _of_all_orders(schema: Any) -> Iterator[Grammar]:
    for order in PropertyOrder:
        yield Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema), property_order=order)


# Garbled names


@pytest.mark.parametrize("order", PropertyOrder)
def test_a_declared_name_cannot_be_begun_where_it_cannot_end(order: PropertyOrder) -> None:
    schema = an_object(RECEIPT)
    behind = '{"total": 1, "vendor": 3, '
    assert begins(schema, behind + '"tota', order)
    assert not begins(schema, behind + '"total', order), "today it can, and ends as totalX"
    assert begins(schema, behind + '"tax"', order)
    assert begins(schema, behind + '"taxes', order), "tax may be written here"
    assert not begins(schema, '{"vendor": 3, "tax": 4, "taxes', order)
    assert accepts(schema, '{"vendor": 3, "subtotal": "x", "tot": 2, "tax": 4}', order)


def test_names_behind_their_place() -> None:
    schema = an_object(RECEIPT)
    assert not begins(schema, '{"vendor": 3, "total')
    assert begins(schema, '{"vendor": 3, "total', ANY)
    assert begins(schema, '{"total_of_all": 3, "total": 1')


def test_a_name_ahead_of_a_required_one_cannot_be_begun() -> None:
    schema = an_object(RECEIPT, required=["total", "vendor"])
    assert not begins(schema, '{"vendor')
    assert not begins(schema, '{"date')
    assert begins(schema, '{"total": 1, "dates')
    assert begins(schema, '{"total": 1, "vendors')
    assert not begins(schema, '{"total": 1, "tax')
    assert begins(schema, '{"total": 1, "vendor": 2, "taxes')


@pytest.mark.parametrize("order", PropertyOrder)
def test_names_that_begin_with_each_other(order: PropertyOrder) -> None:
    schema = an_object(["tax_rate", "tax", "id"])
    assert accepts(schema, text_of(["tax_rate", "tax", "id"]), order)
    assert accepts(schema, text_of(["tax_rates", "tax_rate", "tax"]), order)
    assert accepts(schema, text_of(["taxes", "tax_rate", "tax"]), order)
    assert not begins(schema, '{"tax_rate": 1, "tax_rates', order)
    assert begins(schema, '{"tax_rate": 1, "tax_rat', order), "tax may be written here"
    assert not begins(schema, '{"tax": 1, "taxes', order)
    assert begins(schema, '{"tax": 1, "tax_rate"', order) == (order is ANY)
    assert not begins(schema, '{"tax": 1, "tax_rates', order), "it would begin with tax as well"


@pytest.mark.parametrize("order", PropertyOrder)
def test_names_by_patterns(order: PropertyOrder) -> None:
    schema = an_object(
        ["x-a", "b"],
        patternProperties={"^x-": {"type": "integer"}, "^[0-9]+$": {"type": "null"}},
        additionalProperties=False,
    )
    assert accepts(schema, '{"x-ab": 1, "x-a": 1, "12": null, "b": 2, "x-c": 3}', order)
    assert not begins(schema, '{"x-a": 1, "x-ab', order)
    assert not accepts(schema, '{"x-ab": null, "x-a": 1}', order)
    assert not begins(schema, '{"ba', order)
    found = reports(schema, order)
    assert found["/properties"].enforcement is Enforcement.ENFORCED
    assert found["/additionalProperties"].enforcement is Enforcement.ENFORCED


def test_names_within_bounds_of_their_length() -> None:
    schema = an_object(["ab", "cd"], propertyNames={"minLength": 2, "maxLength": 4})
    assert accepts(schema, '{"abcd": 0, "ab": 1, "xyz": 2}')
    assert not begins(schema, '{"abcde')
    assert not begins(schema, '{"ab": 1, "abc')
    assert not accepts(schema, '{"x": 1}')


def test_the_empty_name_garbles_nothing() -> None:
    schema = an_object(["", "a"])
    assert accepts(schema, '{"a": 1, "b": 2}')
    assert not accepts(schema, '{"a": 1, "": 2}')


def test_where_every_name_would_begin_with_one_that_cannot_be_there() -> None:
    schema = an_object(
        ["a"], patternProperties={"^a": {"type": "string"}}, additionalProperties=False
    )
    assert accepts(schema, '{"ab": "x"}'), "else nothing could be written"
    assert not accepts(schema, '{"a": "x"}')


def test_names_that_are_forbidden() -> None:
    schema = {"type": "object", "properties": {"secret": False}}
    assert not begins(schema, '{"secret')
    assert accepts(schema, '{"sec": 1}')


# All texts of small objects, by a model of what is to come out

NAMES = ("a", "ab", "abc", "b", "c")
_OBJECTS = st.permutations(NAMES).flatmap(
    lambda names: st.tuples(
        st.integers(0, 4).map(lambda count: tuple(names[:count])),
        st.lists(st.booleans(), min_size=4, max_size=4),
    )
)


def expected(
    written: Sequence[str], declared: Sequence[str], required: Sequence[str], order: PropertyOrder
) -> bool:
    """Whether members may be written with these names, one after the other."""
    at = 0
    seen: set[str] = set()
    for name in written:
        if order is ANY:
            possible = [one for one in declared if one not in seen]
        else:
            ahead = declared[at:]
            first = next((i for i, one in enumerate(ahead) if one in required), len(ahead))
            possible = list(ahead[: first + 1])
        if name in declared:
            if name not in possible:
                return False
            at = declared.index(name) + 1
            seen.add(name)
        elif any(name.startswith(one) and one not in possible for one in declared):
            return False
    return seen.issuperset(required)


@pytest.mark.parametrize("order", PropertyOrder)
@given(_OBJECTS)
def test_small_objects(order: PropertyOrder, made: tuple[tuple[str, ...], list[bool]]) -> None:
    declared, flags = made
    required = [name for name, flag in zip(declared, flags, strict=False) if flag]
    schema = an_object(declared, additionalProperties={"type": "integer"}, required=required)
    (grammar,) = [one for one in _of_all_orders(schema) if one.property_order is order]
    compiled = schemas.compiled(analyse(grammar, DEFAULT_LIMITS).grammar.ebnf)
    every = [p for size in range(4) for p in itertools.permutations(NAMES, size)]
    for written in random.Random(0).sample(every, 40):
        accepted = schemas.accepts(compiled, text_of(written))
        assert accepted == expected(written, declared, required, order), written
