"""The order of properties, and additional names that must not garble declared ones."""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from service.schema_compiler.api import analyse
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.schema_compiler.lower.context import MAX_ORDER_RULES
from service.schema_compiler.lower.objects import MAX_TOLD
from service.schema_compiler.report import Enforcement, KeywordReport
from service.structured_output import wire
from service.types import Grammar, GrammarKind, PropertyOrder
from tests.service.schema_compiler import schemas
from tests.service.schema_compiler.agreement import analysed, valid

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


@pytest.mark.parametrize("count", [2, 3, 4, MAX_TOLD])
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
        twice = accepts(schema, text_of([*names, names[-1]]), order)
        assert twice == (is_open and order is ANY), "the last one counts"
        assert accepts(schema, text_of(["x", *names, "y"]), order) == is_open
    assert not accepts(schema, text_of(shuffled)), "the default"


def test_required_names_in_another_order_are_no_order() -> None:
    names = ["a_reason", "b_label", "c_place", "d_score"]
    schema = an_object(names, required=["b_label", "a_reason"])
    assert accepts(schema, text_of(names[:2]))
    assert not accepts(schema, text_of(["b_label", "a_reason"]))


@pytest.mark.parametrize("is_open", [False, True])
def test_any_number_of_optional_names(is_open: bool) -> None:
    """Which of them are there is not told, so that they may come again. The last one counts."""
    names = [f"{letter}name" for letter in string.ascii_lowercase]
    schema = an_object(names, additionalProperties=is_open, required=names[5:8])
    found = reports(schema, ANY)
    assert not any("order" in one.why for one in found.values())
    assert all(one.enforcement is not Enforcement.CHECKED for one in found.values())
    for written in (names, names[::-1], names[5:8], [*names[9::-1], names[0]]):
        assert accepts(schema, text_of(written), ANY)
    assert not accepts(schema, text_of(names[::-1]))
    assert not accepts(schema, text_of(names[6:]), ANY), "a required one is left out"
    assert accepts(schema, text_of([*names, names[5]]), ANY) == is_open, "a required one again"


def test_many_required_names_come_near_an_order() -> None:
    names = [f"{letter}name" for letter in "qwertyuiopasdf"]
    listed = [*names[7:], *names[:7]]
    for is_open in (False, True):
        inner = an_object(["x", *names], required=listed, additionalProperties=is_open)
        schema = {"type": "object", "properties": {"one": inner, "two": an_object(["a", "b"])}}
        found = reports(schema, ANY)
        at = "/properties/one/properties"
        assert found[at].enforcement is Enforcement.ENFORCED
        assert "the 14 required ones near the order of `properties` or of `req" in found[at].why
        assert [one for one in found if "order" in found[one].why] == [at]
        swapped = [name for i in range(0, 14, 2) for name in (names[i + 1], names[i])]
        for written in (
            ["x", *names],
            [*listed, "x"],
            swapped,
            [*listed[1:5], *listed[:1], *listed[5:]],
        ):
            assert accepts(inner, text_of(written), ANY), written
        for left_out in names:
            assert not accepts(inner, text_of([name for name in names if name != left_out]), ANY)
        far = [*names[::-1]]
        assert begins(inner, text_of(far)[:-1], ANY) == is_open, "with others it may be begun"
        assert not accepts(inner, text_of(far), ANY)
        # Where it may be begun, what came before its turn is asked for again.
        assert accepts(inner, text_of([*far, *names, *names]), ANY) == is_open


@pytest.mark.parametrize("keywords", [{"minProperties": 2}, {"maxProperties": 2}])
def test_counted_members_in_any_order(keywords: dict[str, Any]) -> None:
    schema = an_object(["a", "b", "c"], additionalProperties=False, **keywords)
    assert not any("order" in one.why for one in reports(schema, ANY).values())
    for size in range(4):
        for written in itertools.permutations("abc", size):
            fits = size <= 2 if "maxProperties" in keywords else size >= 2
            assert accepts(schema, text_of(written), ANY) == fits
    assert not accepts(schema, text_of("aa"), ANY), "one, which counts once"


@pytest.mark.parametrize("keyword", ["const", "enum"])
def test_listed_objects_come_in_any_order(keyword: str) -> None:
    value = {"a": [{"b": 1, "c": {"d": 0.5, "é": None}}], "z": {}, "e": "x"}
    one = {keyword: value if keyword == "const" else [3, value]}
    for schema, document in ((one, value), ({"additionalProperties": one}, {"x": value})):
        texts = [json.dumps(each, ensure_ascii=False) for each in schemas.orders(document)]
        assert len(texts) == 3 * 2 * 2 * 2
        assert all(accepts(schema, text, ANY) for text in texts)
        assert [text for text in texts if accepts(schema, text)] == texts[:1]
        assert not accepts(schema, texts[0].replace("null", "1"), ANY)
        assert not any("order" in report.why for report in reports(schema, ANY).values())


def test_listed_objects_that_keep_their_order_are_reported() -> None:
    many = {name: i for i, name in enumerate("qwertyuiopas")}
    two = {"a": 1, "b": 2}
    for schema, at, value, wrap in (
        ({"const": many}, "/const", many, "%s"),
        ({"items": {"enum": [two]}, "uniqueItems": True}, "/uniqueItems", two, "[%s]"),
    ):
        other = dict(reversed(value.items()))
        assert accepts(schema, wrap % json.dumps(value), ANY)
        assert not accepts(schema, wrap % json.dumps(other), ANY)
        assert "in the listed order" in reports(schema, ANY)[at].why
        assert "order" not in reports(schema, DECLARED)[at].why


def test_the_declared_order_is_reported() -> None:
    """Where names must be told apart to count them, and are too many; and where some value is asked for."""
    names = [f"{letter}name" for letter in "qwertyuio"]
    schema = an_object(names, additionalProperties=False, minProperties=2)
    why = "in the declared order: members are counted"
    assert reports(schema, ANY)["/properties"].why == why
    assert accepts(schema, text_of(names[:2]), ANY)
    assert not accepts(schema, text_of(names[1::-1]), ANY)
    some = an_object(["a", "b"], additionalProperties=False) | {
        "not": {"patternProperties": {"^a": {"const": 1}}}
    }
    assert "under `not`, some member has to be of a kind" in reports(some, ANY)["/properties"].why


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("/propertyNames", {"propertyNames": {"enum": [*"abcdefghij"]}}),
        (
            "/patternProperties",
            {"patternProperties": {"^(a|b|c|d|e|f|g|h|i|j)$": {}}, "additionalProperties": False},
        ),
    ],
)
def test_the_order_of_names_that_are_only_listed_is_reported(at: str, names: Any) -> None:
    for more in ({"minProperties": 2}, {"not": {"propertyNames": {"enum": ["c"]}}}):
        schema = {"type": "object", **names, **more}
        assert accepts(schema, text_of("ab"), ANY)
        assert not accepts(schema, text_of("ba"), ANY)
        assert "in the declared order" in reports(schema, ANY)[at].why


def test_many_objects_share_what_any_order_may_cost() -> None:
    each = [f"{letter}name" for letter in "qwertyui"]
    count = MAX_ORDER_RULES // 2 ** len(each) + 2
    schema = {
        "type": "array",
        "prefixItems": [
            an_object([f"{name}{i}" for name in each], required=[f"{name}{i}" for name in each])
            for i in range(count)
        ],
    }
    found = reports(schema, ANY)
    whys = [found[f"/prefixItems/{i}/properties"].why for i in range(count)]
    assert "order" not in whys[0]
    assert "the 8 required ones near the order of `properties` or of `required`" in whys[-1]
    parts = [dict.fromkeys((f"{name}{i}" for name in each), 1) for i in range(count)]
    parts[0] = dict(reversed(parts[0].items()))
    assert accepts(schema, json.dumps(parts), ANY)
    assert not any(one.enforcement is Enforcement.CHECKED for one in found.values())


def test_any_order_never_weakens_a_schema() -> None:
    """A large schema keeps all keywords that the declared order enforces."""
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
    assert checked_in(declared)
    assert checked_in(any_order) <= checked_in(declared)


def checked_in(found: dict[str, KeywordReport]) -> set[str]:
    return {at for at, one in found.items() if one.enforcement is Enforcement.CHECKED}


@given(schemas.schemas("object"))
def test_any_order_enforces_what_the_declared_order_does(schema: Any) -> None:
    declared, any_order = analysed(schema, DECLARED), analysed(schema, ANY)
    assert (declared is None) == (any_order is None)
    if declared is not None and any_order is not None:
        checked = {one.pointer for one in declared.report.checked}
        assert {one.pointer for one in any_order.report.checked} <= checked


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


def test_a_declared_name_cannot_be_begun_where_it_cannot_end() -> None:
    schema = an_object(RECEIPT)
    behind = '{"total": 1, "vendor": 3, '
    assert begins(schema, behind + '"tota')
    assert not begins(schema, behind + '"total'), "else it ends as totalX"
    assert begins(schema, behind + '"tax"')
    assert begins(schema, behind + '"taxes'), "tax may be written here"
    assert not begins(schema, '{"vendor": 3, "tax": 4, "taxes')
    assert accepts(schema, '{"vendor": 3, "subtotal": "x", "tot": 2, "tax": 4}')


@pytest.mark.parametrize("required", [[], ["total", "tax"], list(RECEIPT)])
def test_in_any_order_a_declared_name_can_always_end(required: list[str]) -> None:
    """So that others may begin with it: what fits can be written, and no name has to go on."""
    schema = an_object(RECEIPT, required=required)
    every = text_of(RECEIPT)[:-1]
    for before in ("{", every + ", ", every + ', "total_tax": 1, '):
        for name in RECEIPT:
            assert begins(schema, f'{before}"{name}": 1', ANY)
            for other in (f"{name} ", f"{name}_tax", name[:-1]):
                assert begins(schema, f'{before}"{other}": "x"', ANY)
                assert accepts(schema, f'{every}, "{other}": "x"}}', ANY)
    assert not accepts(schema, every + ', "total": "x"}', ANY), "with a value of its own"


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
    assert begins(schema, '{"tax_rate": 1, "tax_rates', order) == (order is ANY)
    assert begins(schema, '{"tax_rate": 1, "tax_rat', order), "tax may be written here"
    for name in ('"tax_rate"', '"taxes', '"tax_rates'):
        assert begins(schema, '{"tax": 1, ' + name, order) == (order is ANY), "it begins with tax"


@pytest.mark.parametrize("order", PropertyOrder)
def test_names_by_patterns(order: PropertyOrder) -> None:
    schema = an_object(
        ["x-a", "b"],
        patternProperties={"^x-": {"type": "integer"}, "^[0-9]+$": {"type": "null"}},
        additionalProperties=False,
    )
    assert accepts(schema, '{"x-ab": 1, "x-a": 1, "12": null, "b": 2, "x-c": 3}', order)
    assert begins(schema, '{"x-a": 1, "x-ab', order) == (order is ANY)
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
            possible = list(declared)
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
    every = [p for size in range(4) for p in itertools.product(NAMES, repeat=size)]
    for written in random.Random(0).sample(every, 40):
        accepted = schemas.accepts(compiled, text_of(written))
        assert accepted == expected(written, declared, required, order), written


# Objects with more names than are told apart

MANY = tuple("abcdefghij")
_MEMBERS = st.sampled_from(({"type": "integer"}, {"enum": [1, "x"]}, {}))
_LARGE = st.fixed_dictionaries(
    {
        "type": st.just("object"),
        "properties": st.dictionaries(st.sampled_from(MANY), _MEMBERS, min_size=1),
        "additionalProperties": st.sampled_from((False, False, True, {"type": "integer"})),
        "required": st.lists(st.sampled_from(MANY), unique=True, max_size=4),
    },
    optional={
        "minProperties": st.integers(0, 5),
        "maxProperties": st.integers(0, 10),
        "patternProperties": st.just({"^a": {"type": "integer"}}),
        "dependentRequired": st.dictionaries(
            st.sampled_from(MANY),
            st.lists(st.sampled_from(MANY), unique=True, max_size=2),
            max_size=2,
        ),
    },
)
_PAIRS = st.lists(
    st.tuples(
        st.sampled_from((*MANY, "aa", "b ", "z")), st.sampled_from(("1", "1", "1", '"x"', "[]"))
    ),
    max_size=12,
)


@settings(max_examples=200)
@given(_LARGE, st.lists(_PAIRS, min_size=10, max_size=20), st.randoms(use_true_random=False))
def test_large_objects(
    schema: Any, written: list[list[tuple[str, str]]], rng: random.Random
) -> None:
    """What is valid can be written with its names in whatever order, and what can be written under a grammar
    that enforces everything is valid, with names that repeat as well."""
    found = analysed(schema, ANY)
    if found is None:
        return
    compiled = schemas.compiled(found.grammar.ebnf)
    enforced = found.report.enforcement is Enforcement.ENFORCED
    needed = [*schema["required"], *schema["properties"]]
    fitting = [[(name, "1") for name in needed[:size]] for size in range(len(needed) + 1)]
    for pairs in [*written, *fitting, *([*one, *one[:2]] for one in fitting)]:
        rng.shuffle(pairs)
        text = "{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}"
        accepted, is_valid = schemas.accepts(compiled, text), valid(schema, text)
        repeats = len(dict(pairs)) < len(pairs)
        if enforced and accepted:
            assert is_valid, text
        if (
            is_valid
            and not repeats
            and not any("order" in one.why for one in found.report.keywords)
        ):
            event("valid, with several names" if len(pairs) > 2 else "valid")
            assert accepted, text
        if accepted and repeats:
            event("accepted, with a name that repeats")
