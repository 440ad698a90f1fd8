"""What a schema becomes in each stage of the compiler, without the stages behind it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.errors import GrammarError
from service.schema_compiler.api import CompiledSchema, Options, compile_schema
from service.schema_compiler.budget import Budget, bounded
from service.schema_compiler.frontend import drafts
from service.schema_compiler.frontend.checked_schema import checked_schema
from service.schema_compiler.ir.values import (
    AcceptedText,
    AdditionalProperties,
    Alternative,
    AnyOrder,
    AnyText,
    Array,
    Constant,
    CountedArray,
    Digits,
    DistinctArray,
    ItemCount,
    ItemValue,
    MatchedText,
    NameSet,
    Number,
    Object,
    OtherText,
    PrefixedText,
    Property,
    PropertyValue,
    Reference,
    Scientific,
    String,
    Suffix,
    WithSuffix,
    Zero,
)
from service.schema_compiler.lower import string_patterns
from service.schema_compiler.lower.arrays import INCOMPARABLE, MAX_DISTINCT
from service.schema_compiler.lower.lowering import normalized
from service.schema_compiler.lower.objects import LAST_COUNTS
from service.schema_compiler.normalize import expand
from service.schema_compiler.normalize.constraints import Forbidden, Literal, Properties, Required
from service.schema_compiler.normalize.nodes import OBJECT, STRING, TYPES
from service.schema_compiler.report import Enforcement
from service.schema_compiler.stages import STAGES
from service.types import PropertyOrder
from tests.service.schema_compiler import schemas


def compiled(schema: Any, order: PropertyOrder = PropertyOrder.DECLARED) -> CompiledSchema:
    return compile_schema(json.dumps(schema), options=Options(order))


def root(schema: Any, order: PropertyOrder = PropertyOrder.DECLARED) -> tuple[Alternative, ...]:
    document = compiled(schema, order).document
    return document.values[document.root]


def values(schema: Any) -> dict[Reference, tuple[Alternative, ...]]:
    return dict(compiled(schema).document.values)


# normalize


def alternatives(schema: Any) -> list[Any]:
    """By type, the alternatives of the root as pairs of keyword and value."""
    text = json.dumps(schema)
    with bounded(Budget()):
        expansion = normalized(checked_schema(text), text)[0][1]
    return [
        [
            tuple((c.keyword, c.value, c.negated) for c in one if isinstance(c, Literal))
            for one in some
        ]
        for some in expansion
    ]


def test_a_type_leaves_the_other_types_without_alternatives() -> None:
    found = alternatives({"type": "string", "minLength": 2, "minimum": 3})
    assert found[STRING] == [(("minLength", 2, False),)]
    assert [t for t in TYPES if found[t]] == [STRING]


def test_any_of_is_alternatives_and_all_of_a_conjunction() -> None:
    one, other = {"minLength": 1}, {"maxLength": 5}
    assert alternatives({"anyOf": [one, other], "type": "string"})[STRING] == [
        (("minLength", 1, False),),
        (("maxLength", 5, False),),
    ]
    assert alternatives({"allOf": [one, other], "type": "string"})[STRING] == [
        (("minLength", 1, False), ("maxLength", 5, False))
    ]


def test_not_is_pushed_into_the_constraints() -> None:
    found = alternatives({"not": {"minLength": 3}, "type": "string"})
    assert found[STRING] == [(("maxLength", 2, False),)]
    found = alternatives({"not": {"pattern": "a"}, "type": "string"})
    assert found[STRING] == [(("pattern", "a", True),)]


def test_one_of_excludes_the_other_branches_only_where_they_overlap() -> None:
    apart = alternatives({"oneOf": [{"const": "a"}, {"const": "b"}]})
    assert apart[STRING] == [(("enum", ["a", "b"], False),)]
    overlapping = alternatives({"oneOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"})
    assert overlapping[STRING] == [
        (("pattern", "a", False), ("pattern", "b", True)),
        (("pattern", "b", False), ("pattern", "a", True)),
    ]


def test_dependencies_are_alternatives() -> None:
    text = json.dumps({"dependentRequired": {"a": ["b"]}, "type": "object"})
    with bounded(Budget()):
        without, with_it = normalized(checked_schema(text), text)[0][1][OBJECT]
    assert [type(one).__name__ for one in without] == ["Forbidden"]
    (required,) = with_it
    assert isinstance(required, Required)
    assert required.names == ("a", "b")


def test_names_that_ask_for_the_same_one_are_two_alternatives() -> None:
    names = [f"n{i}" for i in range(9)]
    schema = {"dependentRequired": {name: ["b"] for name in names}, "type": "object"}
    text = json.dumps(schema)
    with bounded(Budget()):
        without, with_it = normalized(checked_schema(text), text)[0][1][OBJECT]
    assert [one.name for one in without if isinstance(one, Forbidden)] == [*names, "b"]
    (required,) = with_it
    assert isinstance(required, Required)
    assert required.names == ("b",)


def test_an_absent_or_wrong_property_is_one_alternative() -> None:
    schema = {
        "not": {"properties": {"a": {"type": "null"}}, "required": ["a", "b"]},
        "type": "object",
    }
    text = json.dumps(schema)
    with bounded(Budget()):
        (wrong,), (forbidden,) = normalized(checked_schema(text), text)[0][1][OBJECT]
    assert isinstance(wrong, Properties)
    assert list(wrong.declared) == ["a"]
    assert isinstance(forbidden, Forbidden)
    assert forbidden.name == "b"


def test_one_of_many_properties_is_enforced() -> None:
    branches = [
        {"properties": {f"n{i}": {"type": "integer"}}, "required": [f"n{i}"]} for i in range(20)
    ]
    assert (
        compiled({"type": "object", "oneOf": branches}).report.enforcement is Enforcement.ENFORCED
    )


# lower: strings, numbers and constants


def test_constants() -> None:
    assert root({"enum": [None, True, 1, "é", [1, {"a": 2}]]}) == (
        Constant("null"), Constant("true"), Constant("1"), Constant('"é"'), Constant('[1, {"a": 2}]'),
    )  # fmt: skip


def test_strings_by_length() -> None:
    assert root({"type": "string"}) == (String(AnyText()),)
    assert root({"type": "string", "minLength": 2, "maxLength": 5}) == (
        String(AnyText(2, 5), shortest=4, minimum=2, maximum=5),
    )


def test_a_grammar_does_not_count_to_large_lengths_but_the_value_knows_them() -> None:
    found = compiled({"type": "string", "maxLength": 255})
    assert found.document.values[0] == (String(AnyText(), maximum=255),)
    assert [one.pointer for one in found.report.checked] == ["/maxLength"]


def test_a_deterministic_pattern_stays_an_expression() -> None:
    (found,) = root({"type": "string", "pattern": "^[a-c]{1,500}$"})
    assert isinstance(found, String)
    assert isinstance(found.texts, MatchedText)


def test_other_patterns_become_automata() -> None:
    (found,) = root({"type": "string", "pattern": "^(a|ab)(c|bcd)$"})
    assert isinstance(found, String)
    assert isinstance(found.texts, AcceptedText)
    texts = {"ac", "abc", "abcd", "abbcd"}
    assert all(map(found.texts.automaton.reaches, texts))
    assert found.texts.automaton.lengths() == (2, 5)


def test_integers_are_digits_and_tens_have_a_zero_behind() -> None:
    (found,) = root({"type": "integer", "minimum": 7, "maximum": 8})
    assert isinstance(found, Number)
    assert isinstance(found.numbers, Digits)
    assert found.numbers.negative is None
    first = found.numbers.states[found.numbers.unsigned or 0]
    assert [symbols for symbols, _ in first.edges] == ["78"]
    (tens,) = root({"type": "integer", "multipleOf": 10, "minimum": 0, "maximum": 30})
    assert isinstance(tens, Number)
    with_zero, zero = getattr(tens.numbers, "sets")  # noqa: B009
    assert (with_zero.suffix, zero) == (1, Zero())


def test_numbers_have_exponents_where_bounds_allow_it() -> None:
    (free,) = root({"type": "number"})
    assert isinstance(free, Number)
    assert isinstance(free.numbers, WithSuffix)
    assert free.numbers.suffix is Suffix.EXPONENT
    (bounded_,) = root({"type": "number", "minimum": 0, "maximum": 5})
    assert isinstance(bounded_, Number)
    assert Scientific(small=True, negative=False) in getattr(bounded_.numbers, "sets")  # noqa: B009


# lower: objects


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": False,
    }  # fmt: skip


def test_a_closed_object() -> None:
    found = values(closed(["a"], a={"const": 1}, b={"type": "null"}))
    assert found == {
        0: (
            Object(
                (
                    Property("a", True, (PropertyValue(1),)),
                    Property("b", False, (PropertyValue(2),)),
                )
            ),
        ),
        1: (Constant("1"),),
        2: (Constant("null"),),
    }


def test_names_of_additional_properties_do_not_begin_with_declared_ones_that_may_be_over() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "additionalProperties": {"const": 2},
    }
    (found,) = root(schema)
    assert isinstance(found, Object)
    (additional,) = found.additional
    assert additional == AdditionalProperties(
        NameSet(
            OtherText(0, None, frozenset(), frozenset(("a",))),
            {"a": PrefixedText("a", AnyText(1, None))},
        ),
        (PropertyValue(2),),
    )


def test_an_object_in_any_order() -> None:
    (found,) = root(closed([], a=True, b=True), PropertyOrder.ANY)
    assert isinstance(found, Object)
    assert found.any_order == AnyOrder(True, 2, (("a", "b"),))
    (declared,) = root(closed([], a=True, b=True))
    assert isinstance(declared, Object)
    assert declared.any_order is None


def test_properties_are_counted_only_where_it_makes_a_difference() -> None:
    (useless,) = root(closed(["a"], a=True, b=True) | {"minProperties": 1, "maxProperties": 2})
    assert isinstance(useless, Object)
    assert (useless.minimum, useless.maximum) == (0, None)
    (useful,) = root(closed([], a=True, b=True) | {"minProperties": 1})
    assert isinstance(useful, Object)
    assert (useful.minimum, useful.maximum) == (1, None)


def test_a_negated_pattern_property_is_an_obligation() -> None:
    (found,) = root({"type": "object", "not": {"patternProperties": {"^a": {"const": 1}}}})
    assert isinstance(found, Object)
    assert found.obligations == 1
    assert {value.meets for kind in found.additional for value in kind.values} == {0, 1}
    assert found.lasting == 1


def test_what_every_value_of_a_name_meets_does_not_have_to_last() -> None:
    closed_by_pattern = {"patternProperties": {"^a": {}}, "additionalProperties": False}
    (found,) = root({"type": "object", "not": closed_by_pattern})
    assert isinstance(found, Object)
    assert found.obligations == 1
    assert found.lasting == 0


def test_values_that_cannot_all_last_are_checked() -> None:
    several = [{"additionalProperties": one} for one in ({"const": 1}, {"not": {"const": 1}})]
    found = compiled({"type": "object", "not": {"anyOf": several}})
    assert [one.why for one in found.report.checked] == [LAST_COUNTS] * 2


# lower: arrays


def test_items_by_position() -> None:
    schema = {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 1}
    assert values(schema) == {
        0: (Array((1,), 2, minimum=1),),
        1: (Constant("1"),),
        2: (Constant("2"),),
    }


def test_items_that_no_value_fits_end_an_array() -> None:
    assert root({"type": "array", "prefixItems": [{"const": 1}, False]}) == (
        Array((1,), None, maximum=1),
    )


def test_contains_counts_items() -> None:
    schema = {
        "type": "array",
        "items": {"enum": [1, 2]},
        "contains": {"const": 1},
        "maxContains": 2,
    }
    (found,) = root(schema)
    assert isinstance(found, CountedArray)
    assert found.counts == (ItemCount(1, 2),)
    assert [[one.counts_for for one in some] for some in found.items] == [[(0,), ()]]
    assert all(isinstance(one, ItemValue) for some in found.items for one in some)


def test_different_items_out_of_a_few() -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1}
    assert root(schema) == (DistinctArray(('"a"', '"b"'), minimum=1),)


def test_different_items_out_of_more_values_are_checked() -> None:
    for number in (MAX_DISTINCT, MAX_DISTINCT + 1):
        schema = {"type": "array", "items": {"enum": [*range(number)]}, "uniqueItems": True}
        why = [one.why for one in compiled(schema).report.checked]
        assert why == [INCOMPARABLE] * (number - MAX_DISTINCT)
    assert f"an enum of at most {MAX_DISTINCT} values" in INCOMPARABLE


def distinct(items: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, **keywords}


def integers(low: Any, high: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high, **keywords}


OPEN = {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}


@pytest.mark.parametrize(
    ("items", "texts"),
    [
        (integers(1, 3), ("1", "2", "3")),
        (integers(-1, 1), ("-1", "0", "1")),
        (integers(0.5, 3.5), ("1", "2", "3")),
        (OPEN, ("1", "2")),
        ({**OPEN, "exclusiveMinimum": -0.5, "exclusiveMaximum": 1.5}, ("0", "1")),
        (integers(0, 4, exclusiveMinimum=0), ("1", "2", "3", "4")),
        (integers(10**30, 10**30 + 1), (str(10**30), str(10**30 + 1))),
        (integers(0, 4, multipleOf=2), ("0", "2", "4")),
        (integers(0, 3, **{"not": {"enum": [1, 2.0]}}), ("0", "3")),
        (integers(3, 1), ()),
        ({"anyOf": [integers(1, 2), integers(2, 3), {"enum": ["a", 1]}]}, ("1", "2", "3", '"a"')),
        ({"type": ["integer", "null"], "minimum": 1, "maximum": 2}, ("null", "1", "2")),
    ],
)
def test_different_integers_of_a_small_range(items: Any, texts: tuple[str, ...]) -> None:
    found = compiled(distinct(items, maxItems=4))
    (one,) = found.document.values[found.document.root]
    assert isinstance(one, DistinctArray)
    assert sorted(one.texts) == sorted(texts)
    assert (one.minimum, one.maximum) == (0, 4)
    assert found.report.checked == ()


def test_the_grammar_of_different_integers() -> None:
    grammar = schemas.compiled(compiled(distinct(integers(1, 3), minItems=1)).grammar)
    for text in ("[1]", "[3, 1]", "[2, 3, 1]"):
        assert schemas.accepts(grammar, text)
    for text in ("[]", "[1, 1]", "[1, 2, 1]", "[4]", "[1, 2, 3, 1]", "[1, 1.0]", '["1"]'):
        assert not schemas.accepts(grammar, text)


def test_different_integers_of_a_greater_range_are_checked() -> None:
    for number in (MAX_DISTINCT, MAX_DISTINCT + 1):
        why = [one.why for one in compiled(distinct(integers(1, number))).report.checked]
        assert why == [INCOMPARABLE] * (number - MAX_DISTINCT)
    assert f"a range of at most {MAX_DISTINCT} integers" in INCOMPARABLE


@pytest.mark.parametrize(
    "items",
    [
        {"type": "integer", "minimum": 1},
        {"type": "integer", "maximum": 3},
        {"type": "number", "minimum": 1, "maximum": 3},
        {"type": "number", "minimum": 1, "maximum": 3, "multipleOf": 1},  # 1 or 1.0
        integers(1, 2, multipleOf=1e-15),
        {"anyOf": [integers(1, 2), {"enum": [1.0]}]},
        {"anyOf": [integers(1, 2), {"type": "string"}]},
        {"anyOf": [integers(1, 3), integers(4, 6)]},
    ],
)
def test_items_that_are_no_few_integers_are_checked(items: Any) -> None:
    why = {one.keyword: one.why for one in compiled(distinct(items)).report.checked}
    assert why["uniqueItems"] == INCOMPARABLE


def test_names_are_not_looked_for_among_integers() -> None:
    names = {"anyOf": [{"enum": ["a"]}, integers(1, 2)]}
    assert root({"type": "object", "propertyNames": names}) == root(
        {"type": "object", "propertyNames": {"anyOf": [{"enum": ["a"]}, {"type": "integer"}]}}
    )


# Documents


def test_a_value_that_contains_itself() -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": closed([], next={"$ref": "#"})}}
    found = values(schema)
    assert found == {0: (Object((Property("next", False, (PropertyValue(0),)),)),)}


def test_alternatives_and_properties_without_a_value_are_gone() -> None:
    endless = closed(["next"], next={"$ref": "#/$defs/endless"})
    schema = {
        "$defs": {"endless": endless},
        **closed([], a={"const": 1}, b={"$ref": "#/$defs/endless"}),
    }
    assert values(schema) == {
        0: (Object((Property("a", False, (PropertyValue(1),)),)),),
        1: (Constant("1"),),
    }
    with pytest.raises(GrammarError, match="no value can fit"):
        compiled(closed(["next"], next={"$ref": "#"}))


def test_a_bound_of_the_text_that_is_forced() -> None:
    assert compiled({"const": "x" * 1000}).forced_text == 1002
    assert compiled({"type": "null"}).forced_text == 4


# All stages as text


@pytest.mark.parametrize("stage", STAGES)
def test_stages_as_text(stage: str) -> None:
    schema = json.dumps(closed(["a"], a={"type": "string", "pattern": "^x+$"}))
    lines = list(STAGES[stage](schema, Options()))
    wanted = {
        "normalized": "  string: Literal(keyword='pattern', value='^x+$', pointer='/properties/a/pattern')",
        "ir": "value 0 (root)",
        "grammar": 'value ::= "{" "\\U00000022a\\U00000022: " "\\U00000022" [x] [x]* "\\U00000022" "}"',
        "report": "  enforced   /properties/a/pattern",
        "prompt": json.dumps(json.loads(schema), separators=(",", ":")),
    }
    assert wanted[stage] in lines


def test_names_whose_automaton_is_too_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string_patterns, "_fitted", lambda *_: None)
    schema = {
        "type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": False,
        "patternProperties": {"^(a|ab)(c|bcd)$": {"const": 2}},
    }  # fmt: skip
    found = compiled(schema)
    (one,) = found.document.values[found.document.root]
    assert isinstance(one, Object)
    assert all(not kind.names.extending for kind in one.additional)
    assert "/patternProperties" in {keyword.pointer for keyword in found.report.checked}


@pytest.mark.parametrize("schema", [{"uniqueItems": True}, {"not": {"uniqueItems": True}}])
def test_a_keyword_that_the_compiler_does_not_know_is_checked(
    schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand, "UNDERSTOOD", expand.UNDERSTOOD - {"uniqueItems"})
    why = {one.keyword: one.why for one in compiled({"type": "array", **schema}).report.checked}
    assert why["uniqueItems"] == "a grammar cannot express this keyword"


def test_the_compiler_knows_every_keyword_that_constrains_values() -> None:
    assert {*drafts.ASSERTING} - expand.UNDERSTOOD == set()
