"""The emission of documents that are made by hand: which texts their grammars accept."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from functools import cache
from itertools import permutations

import pytest

from service.schema_compiler.api import analyse
from service.schema_compiler.budget import Budget, bounded
from service.schema_compiler.emit.grammar import choice_grammar, grammar_of
from service.schema_compiler.emit.string_lengths import Bounds, string_lengths
from service.schema_compiler.ir.sizes import forced_text, pruned, short_lengths
from service.schema_compiler.ir.values import (
    AdditionalProperties,
    Alternative,
    AnyOrder,
    AnyText,
    Array,
    Constant,
    CountedArray,
    DistinctArray,
    Document,
    ItemCount,
    ItemValue,
    NameSet,
    Object,
    OtherText,
    PrefixedText,
    Property,
    PropertyValue,
    String,
)
from service.schema_compiler.limits import DEFAULT_LIMITS
from service.types import Grammar, GrammarKind
from tests.service.schema_compiler.schemas import accepts, compiled

ONE, TWO = (Constant("1"),), (Constant("2"),)


def document(*values: tuple[Alternative, ...]) -> Document:
    """A document whose values have the numbers of their order; the first is the root."""
    return Document(0, dict(enumerate(values)))


def accepted(values: Document, texts: Iterable[str]) -> list[str]:
    with bounded(Budget()):
        grammar = compiled(grammar_of(values))
    return [text for text in texts if accepts(grammar, text)]


def prop(name: str, value: int, *, required: bool = True, meets: int = 0) -> Property:
    return Property(name, required, (PropertyValue(value, meets),))


def test_constants_are_alternatives() -> None:
    values = document((Constant("null"), Constant('"a b"'), Constant("[1]")))
    texts = ["null", '"a b"', "[1]", "[2]", "nul", '"a"']
    assert accepted(values, texts) == texts[:3]


def test_properties_in_the_declared_order() -> None:
    values = document((Object((prop("a", 1), prop("b", 2, required=False))),), ONE, TWO)
    texts = ['{"a": 1}', '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"b": 2}', "{}", '{"a": 2}']
    assert accepted(values, texts) == texts[:2]


def test_properties_in_any_order() -> None:
    names = "abc"
    properties = tuple(prop(name, 1) for name in names)
    values = document((Object(properties, any_order=AnyOrder(True, 3, (tuple(names),))),), ONE)
    texts = [
        "{" + ", ".join(f'"{name}": 1' for name in order) + "}"
        for size in (3, 2)
        for order in permutations(names, size)
    ]
    assert accepted(values, texts) == texts[:6]


def test_additional_properties_stand_between_declared_ones() -> None:
    names = NameSet(
        OtherText(0, None, frozenset(), frozenset("a")), {"a": PrefixedText("a", AnyText(1, None))}
    )
    one = Object(
        (prop("a", 1, required=False),), (AdditionalProperties(names, (PropertyValue(2),)),)
    )
    texts = ["{}", '{"x": 2, "a": 1, "y": 2}', '{"ab": 2, "a": 1}', '{"a": 1, "ab": 2}', '{"a": 2}']
    assert accepted(document((one,), ONE, TWO), texts) == texts[:3]


def test_names_that_may_stand_everywhere_are_written_once() -> None:
    """In one rule, and where the object begins without a comma: not once for each position."""
    longer = {name: PrefixedText(name, AnyText(1, None)) for name in "abcd"}
    names = NameSet(OtherText(0, None, frozenset(), frozenset("abcd")), longer)
    one = Object(
        tuple(prop(name, 1, required=False) for name in "abcd"),
        (AdditionalProperties(names, (PropertyValue(1),)),),
    )
    with bounded(Budget()):
        bodies = [line.split(" ::= ")[1] for line in grammar_of(document((one,), ONE)).splitlines()]
    assert sum("json_leaves" in body for body in bodies) == 2
    texts = ['{"x": 1, "cc": 1, "b": 1, "x": 1, "d": 1}', '{"b": 1, "bb": 1}', '{"b": 1, "aa": 1}']
    assert accepted(document((one,), ONE), texts) == texts[:1]


def test_characters_that_no_excluded_name_has_share_a_rule() -> None:
    """Of all objects: what may follow a character is compiled once for each rule that takes it."""

    def closed_to(name: str, value: int) -> Object:
        names = NameSet(OtherText(0, None, frozenset(), frozenset((name,))))
        return Object(
            (prop(name, value, required=False),),
            (AdditionalProperties(names, (PropertyValue(value),)),),
        )

    values = document((closed_to("ab", 1),), (closed_to("é", 2),), ONE)
    with bounded(Budget()):
        rules = grammar_of(values).splitlines()
    assert sum(rule.startswith("json_others") for rule in rules) == 1
    names = ["a", "aé", "z", "ba", "\n", "😀", "ab", "é", "ü", "éa"]
    texts = [json.dumps({"x": {name: 1}}, ensure_ascii=False) for name in names]
    assert accepted(values, texts) == texts[:-1]


def test_characters_of_excluded_names_are_in_few_rules() -> None:
    """A compiler goes through a fifth of a real vocabulary for each rule that begins with letters."""
    names = ["name", "street", "city", "country", "phone", "email", "birthday"]
    texts = OtherText(0, None, frozenset(names), frozenset())
    one = Object((), (AdditionalProperties(NameSet(texts), (PropertyValue(1),)),))
    values = document((one,), ONE)
    with bounded(Budget()):
        rules = grammar_of(values).splitlines()
    assert not any("[" in rule for rule in rules if rule.startswith("json_leaves"))
    blocks = [rule for rule in rules if rule.startswith("json_block")]
    assert len(blocks) < 2 * len(set("".join(names)))
    free = ["nam", "names", "n", "", "cit", "cities", "é", "mail", "zip", "bin\n"]
    written = [json.dumps({name: 1}, ensure_ascii=False) for name in (*free, *names)]
    assert accepted(values, written) == written[: len(free)]


def test_ends_of_names_share_the_blocks_of_excluded_names() -> None:
    """A class of all letters of excluded names would be one more state for a compiler."""
    names = ["name", "street"]
    texts = OtherText(0, None, frozenset(names), frozenset())
    kinds = (AdditionalProperties(NameSet(texts), (PropertyValue(1),)),)
    longer = AdditionalProperties(
        NameSet(None, {"name": PrefixedText("name", AnyText(1, None))}), (PropertyValue(1),)
    )
    one = Object((prop("name", 1, required=False),), (*kinds, longer))
    with bounded(Budget()):
        rules = grammar_of(document((one,), ONE)).splitlines()
    (some,) = (rule for rule in rules if rule.startswith("json_some "))
    assert "[" not in some
    assert some.count("json_block") == 2


@pytest.mark.parametrize("pattern", ["[0-9]{3}", "[0-9]$", "[0-9][.][0-9]", "[a-z][0-9][a-z]"])
def test_rules_of_a_pattern_begin_with_a_character(pattern: str) -> None:
    """With another rule at the beginning, a matcher takes time for each character that came before: masks
    take a millisecond behind a thousand of them."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    found = analyse(Grammar(GrammarKind.JSON_SCHEMA, schema), DEFAULT_LIMITS).grammar.ebnf
    bodies = dict(rule.split(" ::= ", 1) for rule in found.splitlines())
    texts = [body for name, body in bodies.items() if name.startswith("json_text")]
    ways = [way for body in texts for way in body.split(" | ")]
    assert len(texts) > 1
    # The canonical escapes are a rule, with just one rule behind it.
    assert all(way[0] in '"[' or way.startswith("json_escape json_text") for way in ways)


def _readings(ebnf: str, text: str) -> int:
    """In how many ways a grammar without groups in brackets, as far as the text needs it, reads a text."""
    bodies = dict(rule.split(" ::= ", 1) for rule in ebnf.splitlines())

    @cache
    def ways(parts: tuple[str, ...], at: int) -> int:
        if not parts:
            return int(at == len(text))
        first, *rest = parts
        if first.startswith('"'):
            word = ast.literal_eval(first)
            return ways((*rest,), at + len(word)) if text.startswith(word, at) else 0
        if first.startswith("["):
            fits = at < len(text) and re.fullmatch(first, text[at])
            return ways((*rest,), at + 1) if fits else 0
        some = (re.findall(r'"[^"]*"|\[[^\]]*\]|\w+', way) for way in bodies[first].split(" | "))
        return sum(ways((*one, *rest), at) for one in some)

    return ways(("root",), 0)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"pattern": "[0-9]{3}"}, "xy zw, 1234é v"),
        ({"pattern": "[a-z][0-9][a-z]"}, "xy zw, 1 a1bv"),
        ({"format": "regex", "minLength": 1}, "xy zw[ab -]*,(v|wx)?z"),
    ],
)
def test_a_text_has_one_reading(keywords: dict[str, object], text: str) -> None:
    """With two readings of each character, a matcher takes time for each one that came before: a
    millisecond a character in an object, behind a thousand of them."""
    schema = json.dumps({"type": "string", **keywords})
    ebnf = analyse(Grammar(GrammarKind.JSON_SCHEMA, schema), DEFAULT_LIMITS).grammar.ebnf
    assert _readings(ebnf, f'"{text}"') == 1


def test_rules_of_regular_expressions_go_on_with_themselves() -> None:
    """A compiler has a short cut for rules that do."""
    schema = '{"type": "string", "format": "regex"}'
    found = analyse(Grammar(GrammarKind.JSON_SCHEMA, schema), DEFAULT_LIMITS).grammar.ebnf
    bodies = dict(rule.split(" ::= ", 1) for rule in found.splitlines())
    wide = [name for name, body in bodies.items() if r"-\U0010ffff" in body]
    assert len(wide) == 6
    assert all(f"] {name} |" in bodies[name] for name in wide)


def test_only_the_empty_name_is_excluded() -> None:
    texts = OtherText(0, None, frozenset({""}), frozenset())
    one = Object((), (AdditionalProperties(NameSet(texts), (PropertyValue(1),)),))
    assert accepted(document((one,), ONE), ['{"a": 1}', '{"": 1}']) == ['{"a": 1}']


def test_names_of_wide_and_escaped_characters() -> None:
    names = NameSet(PrefixedText("a", AnyText(1, None)))
    one = Object((), (AdditionalProperties(names, (PropertyValue(1),)),))
    texts = [json.dumps({"a" + end: 1}, ensure_ascii=False) for end in ("b", "é", "\n", "😀\x01é")]
    others = ['{"a": 1}', '{"a\x01": 1}', '{"a\\u00e9": 1}', '{"b": 1}']
    assert accepted(document((one,), ONE), [*texts, *others]) == texts


@pytest.mark.parametrize(
    ("minimum", "maximum", "sizes"), [(1, None, [1, 2, 3]), (0, 1, [0, 1]), (2, 2, [2])]
)
def test_counted_properties(minimum: int, maximum: int | None, sizes: list[int]) -> None:
    properties = tuple(prop(name, 1, required=False) for name in "abc")
    texts = [json.dumps(dict.fromkeys("abc"[:size], 1)) for size in range(4)]
    one = Object(properties, minimum=minimum, maximum=maximum)
    assert accepted(document((one,), ONE), texts) == [texts[size] for size in sizes]


def test_an_obligation_is_met_by_one_property() -> None:
    values = (PropertyValue(1, meets=1), PropertyValue(2))
    one = Object(tuple(Property(name, False, values) for name in "ab"), obligations=1)
    texts = ['{"a": 1}', '{"a": 2, "b": 1}', '{"a": 1, "b": 1}', '{"a": 2}', "{}"]
    assert accepted(document((one,), ONE, TWO), texts) == texts[:3]


def test_items() -> None:
    values = document((Array((1,), 2, minimum=1, maximum=3),), ONE, TWO)
    texts = ["[1]", "[1, 2]", "[1, 2, 2]", "[1, 2, 2, 2]", "[]", "[2]"]
    assert accepted(values, texts) == texts[:3]


def test_counted_items() -> None:
    one = CountedArray(((ItemValue(1, (0,)), ItemValue(2, ())),), (ItemCount(1, 2),))
    texts = ["[1]", "[2, 1, 2, 1]", "[2]", "[]", "[1, 1, 1]"]
    assert accepted(document((one,), ONE, TWO), texts) == texts[:2]


def test_distinct_items() -> None:
    values = document((DistinctArray(("1", "2"), minimum=1),))
    texts = ["[1]", "[2, 1]", "[1, 1]", "[]", "[1, 2, 1]"]
    assert accepted(values, texts) == texts[:2]


def test_a_value_that_contains_itself() -> None:
    values = document((Constant("0"), Array((), 0)))
    texts = ["0", "[]", "[[0], 0]", "[1]", "[[]"]
    assert accepted(values, texts) == texts[:3]


def test_names_are_canonical_where_a_declared_one_could_be_meant() -> None:
    others = AdditionalProperties(
        NameSet(OtherText(0, None, frozenset({"ab"}), frozenset())), (PropertyValue(1),)
    )
    values = document((Object((prop("ab", 2),), (others,)),), (String(AnyText()),), ONE)
    texts = [
        r'{"ab": 1, "é": "\u00e9"}',
        r'{"ab": 1, "\n": "\/"}',
        r'{"ab": 1, "a\n\u0062\/": ""}',
        r'{"ab": 1, "ac\ud83d\ude00": ""}',
        r'{"ab": 1, "abc\u0062": ""}',
        r'{"ab": 1, "a\u0062": ""}',
        r'{"ab": 1, "\u0061b": ""}',
        r'{"\u0061b": 1}',
    ]
    assert accepted(values, texts) == texts[:5]


def test_names_that_are_not_told_apart_have_any_form() -> None:
    any_name = AdditionalProperties(NameSet(AnyText()), (PropertyValue(1),))
    values = document((Object((), (any_name,)),), (String(AnyText()),))
    texts = [
        r'{"é": "\u00e9"}',
        r'{"\n": "\/"}',
        r'{"\u00e9": ""}',
        r'{"\ud83d": ""}',
        r'{"\x": ""}',
    ]
    assert accepted(values, texts) == texts[:3]


def test_choices() -> None:
    grammar = compiled(choice_grammar(["yes", 'n"o']))
    assert [text for text in ("yes", 'n"o', "no") if accepts(grammar, text)] == ["yes", 'n"o']


# Values without a text


def test_pruning() -> None:
    endless = Object((prop("next", 1),))
    values = {
        0: (Object((prop("a", 2), prop("b", 1, required=False))), Array((1,), None, minimum=1)),
        1: (endless,),
        2: ONE,
        3: TWO,
    }
    with bounded(Budget()):
        lengths = short_lengths(values)
    assert lengths.keys() == {0, 2, 3}
    assert pruned(0, values, lengths) == Document(0, {0: (Object((prop("a", 2),)),), 2: ONE})


@pytest.mark.parametrize(
    "one",
    [
        Object((prop("a", 1, required=False),), minimum=2),
        Object((prop("a", 1), prop("b", 1)), maximum=1),
        Object((prop("a", 1),), obligations=1),
        Array((), 1, minimum=2, maximum=1),
        CountedArray(((ItemValue(1, ()),),), (ItemCount(1, None),)),
        DistinctArray(("1",), minimum=2),
    ],
)
def test_alternatives_that_have_no_text(one: Alternative) -> None:
    with bounded(Budget()):
        assert short_lengths({0: (one,), 1: ONE}).keys() == {1}


def test_recursion_may_force_much_text() -> None:
    values = {0: (Object((prop("a", 0, required=False), prop("b", 1))),), 1: ONE}
    with bounded(Budget()):
        lengths = short_lengths(values)
    assert forced_text(Document(0, values), lengths) > 8192


# String lengths


def test_string_lengths_by_position() -> None:
    names = AdditionalProperties(NameSet(AnyText()), (PropertyValue(2),))
    values = document(
        (Object((prop("a", 1), prop("list", 3)), (names,)),),
        (String(AnyText(), maximum=255),),
        (String(AnyText(), minimum=1),),
        (Array((1,), 2),),
    )
    found = string_lengths(values)
    assert found.at(["a"]) == Bounds(0, 255)
    assert found.at(["other"]) == Bounds(1, None)
    assert found.at(["list", 0]) == Bounds(0, 255)
    assert found.at(["list", 7]) == Bounds(1, None)
    assert found.at([]) is found.at(["a", "b"]) is None


def test_the_loosest_bounds_of_all_alternatives_hold() -> None:
    values = document(
        (Object((prop("a", 1),)), Object((prop("a", 2),)), Constant('{"a": "12345"}')),
        (String(AnyText(), minimum=1, maximum=3),),
        (String(AnyText(), minimum=2, maximum=4), Constant('["x"]')),
    )
    assert string_lengths(values).at(["a"]) == Bounds(1, 5)
    assert string_lengths(values).at(["a", 0]) == Bounds(1, 1)


def test_string_lengths_of_a_value_that_contains_itself() -> None:
    values = document((String(AnyText(), maximum=70), Array((), 0)))
    assert string_lengths(values).at([0, 5, 0]) == Bounds(0, 70)
    assert not string_lengths(values).bounds_nothing
    assert string_lengths(document((DistinctArray(('"ab"',)),))).at([3]) == Bounds(2, 2)
