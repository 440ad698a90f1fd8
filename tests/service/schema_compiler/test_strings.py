"""Grammars of strings against the matcher of patterns, Python's lengths, and json.dumps."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.schema_compiler.budget import Budget
from service.schema_compiler.emit.rules import Rules, pruned
from service.schema_compiler.emit.strings import anything_but
from service.schema_compiler.frontend.formats import FORMATS
from service.schema_compiler.lower.string_constraints import MAX_COUNTED as COUNTED
from service.schema_compiler.normalize.constraints import Literal
from service.schema_compiler.regex.matching import PatternError, compile_pattern
from tests.service.schema_compiler.matching import (
    Emitted,
    accepts,
    compiled,
    emit_regex,
    emit_string,
)
from tests.service.schema_compiler.schemas import walk

CHARACTERS = 'ab"\\x1 -é😀\n\0kKſ_\u2028/\x7f'


def literal(keyword: str, value: object, *, negated: bool = False) -> Literal:
    return Literal(keyword, value, negated=negated)


def holds(one: Literal, text: str) -> bool:
    if one.keyword == "pattern":
        found = compile_pattern(one.value).search(text, Budget())
    elif one.keyword == "enum":
        found = text in one.value
    else:
        found = len(text) >= one.value if one.keyword == "minLength" else len(text) <= one.value
    return found != one.negated


def dumped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def emitted(*literals: Literal, key: bool = False) -> tuple[Emitted, Any]:
    rules = Rules()
    found = emit_string(literals, rules, name=key)
    return found, compiled(found, rules)


atoms = st.sampled_from(
    [
        "a", "b", '"', r"\\", ".", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\s", "x", "é", "😀", r"\n",
        "[a-c-]", r"\0", "[^]", r'[^"\\]', "(?i:k)", "(?i:[^s])", "^", "$", r"\b", r"\B", "[]",
        r"\u{1F600}", r"\ud83d\ude00", r"\u00e9", r"\x61", r"[\W_]", r"\p{Greek}", "(?<name>a|b)", r"[^\s-]",
    ]
)  # fmt: skip
regexes = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(
            inner,
            st.sampled_from(["*", "+", "?", "{2}", "{0}", "{0,3}", "{1,}", "{2,5}", "*?", "??"]),
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda part: f"^{part}$"),
    ),
    max_leaves=8,
)
ahead = st.builds("(?{}{})".format, st.sampled_from("=!"), regexes)
regexes_with_look_ahead = st.builds("^{}{}".format, ahead, regexes.map("(?:{})".format) | ahead)
texts = st.text(CHARACTERS, max_size=7)
negated = st.sampled_from([False, False, False, True])
literals = st.one_of(
    st.builds(lambda p, n: literal("pattern", p, negated=n), regexes, negated),
    st.builds(lambda p, n: literal("pattern", p, negated=n), regexes_with_look_ahead, negated),
    st.builds(lambda v, n: literal("minLength", v, negated=n), st.integers(0, 5), negated),
    st.builds(lambda v, n: literal("maxLength", v, negated=n), st.integers(0, 9), negated),
    st.builds(lambda v: literal("enum", [*v, 1], negated=True), st.lists(texts, max_size=4)),
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(literals, max_size=4), st.lists(texts, min_size=1, max_size=12), st.booleans())
def test_a_string_is_accepted_where_its_literals_hold(
    wanted: list[Literal], tried: list[str], key: bool
) -> None:
    try:
        found, grammar = emitted(*wanted, key=key)
        kept = [one for one in wanted if all(one is not dropped for dropped, _ in found.dropped)]
        tried += [text for one in wanted if one.keyword == "enum" for text in one.value[:-1]]
        for text in tried:
            assert accepts(grammar, dumped(text)) == all(holds(one, text) for one in kept), text
        written = None if grammar is None else walk(grammar, random.Random(0), 90)
        assert written is None or all(holds(one, json.loads(written)) for one in kept), written
    except PatternError:
        assume(False)


@settings(max_examples=30, deadline=None)
@given(regexes | regexes_with_look_ahead, st.lists(texts, min_size=1, max_size=10))
def test_a_text_is_accepted_where_the_whole_of_it_matches(source: str, tried: list[str]) -> None:
    rules = Rules()
    try:
        found, matcher = emit_regex(source, rules), compile_pattern(source, whole=True)
    except PatternError:
        assume(False)
    grammar = compiled(found, rules)
    assert not found.dropped
    for text in tried:
        assert accepts(grammar, text) == matcher.search(text, Budget()), text
    if grammar is not None:
        written = walk(grammar, random.Random(0), 60)
        assert written is None or matcher.search(written, Budget()), written


ILLEGAL = [
    b'"a\nb"',
    b'"\xc3"',
    b'"\xed\xa0\x80"',
    b'"\\ud83d"',
    b'"\\ude00"',
    b'"\\x"',
    b'"\x1f"',
    b'"a',
]
OTHER_SPELLINGS = [
    b'"\\/"',
    b'"\\u0061"',
    b'"\\u000A"',
    b'"\\uD83D\\uDE00"',
    b'"\\u000a"',
    b'"\\u00e9"',
]


@pytest.mark.parametrize("text", ILLEGAL)
def test_what_is_not_json_is_in_no_string(text: bytes) -> None:
    for wanted in ((), (literal("maxLength", 9),), (literal("pattern", "[^]"),)):
        for key in (False, True):
            assert not accepts(emitted(*wanted, key=key)[1], text)


@pytest.mark.parametrize("text", OTHER_SPELLINGS)
def test_only_free_strings_have_other_spellings(text: bytes) -> None:
    assert len(json.loads(text)) == 1
    one = literal("minLength", 1), literal("maxLength", 1)
    assert accepts(emitted()[1], text)
    assert accepts(emitted(*one)[1], text)
    assert accepts(emitted(key=True)[1], text)
    assert not accepts(emitted(*one, key=True)[1], text)
    assert not accepts(emitted(literal("pattern", "[^]"))[1], text)


def test_a_name_that_is_in_no_text_excludes_nothing() -> None:
    grammar = emitted(literal("enum", ["\ud800", "a"], negated=True), key=True)[1]
    assert not accepts(grammar, b'"\xed\xa0\x80b"')
    assert accepts(grammar, '"b"')
    assert not accepts(grammar, '"a"')


def test_excluded_names_give_the_same_grammar_in_any_order() -> None:
    texts = []
    for names in (["so", "sea", "a", "b"], ["b", "a", "sea", "so"]):
        rules = Rules()
        texts.append(rules.text(anything_but(names, 0, None, rules) or ""))
    assert texts[0] == texts[1]


def test_thousands_of_names_are_excluded_soon() -> None:
    names = [f"name_{number * 7919 % 10_007}_{number}" for number in range(1000)]
    began = time.process_time()
    _, grammar = emitted(literal("enum", names, negated=True), key=True)
    assert time.process_time() - began < 5  # about 0.5, nearly all of it in the compiler
    assert not any(accepts(grammar, dumped(name)) for name in names[:50])
    assert all(
        accepts(grammar, dumped(name + end)) for name in names[:25] for end in ("x", " ", '"')
    )
    assert all(accepts(grammar, dumped(name[:-1] + "y")) for name in names[:50])


def test_a_surrogate_pair_is_one_character() -> None:
    two = emitted(literal("minLength", 2))[1]
    assert not accepts(two, b'"\\ud83d\\ude00"')
    assert accepts(two, b'"\\ud83d\\ude00\\u0041"')


@pytest.mark.parametrize(
    ("wanted", "expression"),
    [
        ([literal("pattern", "^[a-z]{1,64}$")], "[a-z]{1,64}"),
        ([literal("pattern", "^[0-9]{1,500}$")], "[0-9]{1,500}"),
        ([literal("pattern", "^[a-z]+$"), literal("maxLength", 63)], "[a-z]{1,63}"),
        ([literal("pattern", "^[a-z]+$"), literal("minLength", 4)], "[a-z]{4,}"),
        ([literal("pattern", "^x[a-z]*$"), literal("maxLength", 9)], '"x" [a-z]{0,8}'),
        ([literal("pattern", r"^\d{4}-\d{2}$")], '[0-9]{4,4} "-" [0-9]{2,2}'),
        ([literal("pattern", "^(?:GET|POST)$")], '("GET" | "POST")'),
        ([literal("pattern", "^[a-z]{2,5}$"), literal("maxLength", 9)], "[a-z]{2,5}"),
    ],
)
def test_simple_patterns_stay_as_they_are(wanted: list[Literal], expression: str) -> None:
    rules = Rules()
    quote = '"\\U00000022"'
    assert emit_string(wanted, rules).expression == f"{quote} {expression} {quote}"
    assert not len(rules)


@pytest.mark.parametrize(
    "wanted",
    [
        [literal("minLength", 3), literal("maxLength", 2)],
        [literal("minLength", 0, negated=True)],
        [literal("pattern", "^a$"), literal("pattern", "^b$")],
        [literal("pattern", "^a$"), literal("minLength", 2)],
        [literal("pattern", "^(a|b)$"), literal("enum", ["a", "b"], negated=True)],
        [literal("pattern", "a*", negated=True)],
        [literal("enum", [""], negated=True), literal("maxLength", 0)],
        [literal("pattern", "[]")],
        [literal("pattern", "^[]$")],
        [literal("pattern", "^([]|a[])?[]$")],
        [literal("pattern", r"^\B$"), literal("pattern", r"\b")],
    ],
)
def test_what_no_string_satisfies_has_no_expression(wanted: list[Literal]) -> None:
    assert emitted(*wanted)[0] == Emitted(None)


def test_the_greatest_length_is_dropped_first() -> None:
    wanted = [
        literal("pattern", r"^\S+ \S+ \S+$"),
        literal("minLength", 9),
        literal("maxLength", 60_000),
    ]
    found, grammar = emitted(*wanted)
    assert [one for one, _ in found.dropped] == wanted[2:]
    assert "counts to more" in found.dropped[0][1]
    assert accepts(grammar, '"aaa bbb ccc"')
    assert not accepts(grammar, '"aa bb cc"')


def test_lengths_up_to_what_is_counted_are_enforced_with_a_pattern() -> None:
    """Where the states of both compile soon enough; see test_compile_time.py for others."""
    wanted = literal("pattern", r"^\w+ \w+ \w+$"), literal("maxLength", COUNTED)
    found, grammar = emitted(*wanted)
    assert not found.dropped
    assert accepts(grammar, dumped("a b " + "c" * (COUNTED - 4)))
    assert not accepts(grammar, dumped("a b " + "c" * (COUNTED - 3)))


LONG_WORDS = [
    f"^[a-z]{{1,{COUNTED + 1}}}$",
    f"^([a-z]{{{COUNTED + 1}}}|-)$",
    rf"\b\w{{2,{COUNTED * 2}}}$",
]


@pytest.mark.parametrize("pattern", LONG_WORDS)
@pytest.mark.parametrize("beside", [(), (literal("enum", ["no"], negated=True),)])
def test_words_in_patterns_are_counted_no_further(
    pattern: str, beside: tuple[Literal, ...]
) -> None:
    """Also where other names are excluded, which takes an automaton."""
    rules = Rules()
    found = emit_string([literal("pattern", pattern), *beside], rules)
    grammar = compiled(found, rules)
    assert [one.value for one, _ in found.dropped] == [pattern]
    assert accepts(grammar, dumped("a" * 3 * COUNTED))
    assert not accepts(grammar, dumped("a!"))
    assert accepts(grammar, '"no"') != bool(beside)
    assert len(rules) < COUNTED / 2


def test_what_is_no_word_of_bounded_length_is_enforced() -> None:
    """Longer words are taken for such words, and are no answers; that is safe."""
    found, grammar = emitted(literal("pattern", f"^[a-z]{{2,{COUNTED + 1}}}$", negated=True))
    assert not found.dropped
    assert all(accepts(grammar, text) for text in ('"a"', '"a1"'))
    assert not any(accepts(grammar, text) for text in ('"ab"', dumped("a" * 2 * COUNTED)))


def test_what_is_no_word_of_at_least_some_length_is_exact() -> None:
    found, grammar = emitted(literal("pattern", f"^[a-z]{{{COUNTED + 1},}}$", negated=True))
    assert not found.dropped
    assert accepts(grammar, dumped("a" * COUNTED))
    assert not accepts(grammar, dumped("a" * (COUNTED + 1)))


def test_names_that_a_pattern_excludes_stay_out_where_it_is_given_up() -> None:
    large = literal("pattern", "a.{14}$")  # from its end, 2**14 states
    found, grammar = emitted(literal("pattern", "^x"), large, literal("enum", ["xq"], negated=True))
    assert found.dropped == ((large, "is too large for a grammar together with the pattern"),)
    assert accepts(grammar, '"xr"')
    assert not accepts(grammar, '"xq"')


def test_numbers_are_counted_further() -> None:
    """Few tokens are of digits alone."""
    wanted = literal("pattern", r"^(\d+-)+\d$"), literal("maxLength", 3 * COUNTED)
    found, grammar = emitted(*wanted)
    assert not found.dropped
    assert accepts(grammar, dumped("1-" * (COUNTED + 1) + "1"))
    assert not accepts(grammar, dumped("1-" * 2 * COUNTED + "1"))


def test_what_longer_words_would_rule_out_is_not_refused() -> None:
    """Of the two, the first matches longer words only, and the second excludes shorter ones."""
    long = f"^[a-z]{{{COUNTED + 6},{COUNTED * 2}}}$", f"^[a-z]{{0,{COUNTED + 1}}}$"
    found, grammar = emitted(literal("pattern", long[0]), literal("pattern", long[1], negated=True))
    assert found.expression is not None
    assert {one.value for one, _ in found.dropped} == set(long)
    assert accepts(grammar, dumped("a" * (COUNTED + 9)))


def test_automata_of_many_states_that_take_words_are_dropped() -> None:
    words = "|".join(f"{n}[ -~]{{50}}{n}" for n in range(12))
    name = f"0{'a' * 50}0"
    other = literal("enum", [name, "no"], negated=True)
    found, grammar = emitted(literal("pattern", f"^({words})$"), other)
    assert [why for _, why in found.dropped] == ["is too large for a grammar"]
    assert not accepts(grammar, dumped(name))
    assert not accepts(grammar, '"no"')
    assert accepts(grammar, '"nor"')
    numbers = words.replace(" -~", "0-9a-f")
    assert not emitted(literal("pattern", f"^({numbers})$"), other)[0].dropped


@pytest.mark.parametrize(
    "wanted",
    [
        literal("maxLength", COUNTED + 1),
        literal("minLength", COUNTED + 1),
        literal("maxLength", COUNTED, negated=True),
        literal("pattern", f"^.{{1,{COUNTED + 1}}}$"),
    ],
)
def test_lengths_beyond_what_is_counted_are_dropped(wanted: Literal) -> None:
    found, grammar = emitted(wanted, literal("minLength", 2))
    assert wanted in [one for one, _ in found.dropped]
    assert {why for _, why in found.dropped} == {
        f"counts to more than {COUNTED} characters, which a grammar does not"
    }
    for length in (COUNTED, COUNTED + 2):
        assert accepts(grammar, dumped("a" * length))


@pytest.mark.parametrize(
    "wanted",
    [
        [literal("minLength", 1), literal("maxLength", 5)],
        [literal("maxLength", COUNTED)],
        [literal("minLength", COUNTED)],
        [literal("enum", ["ab", "abc"], negated=True), literal("maxLength", 9)],
        [literal("pattern", "^.{2,9}$")],
        [literal("pattern", "^x.*$")],
        [literal("pattern", r"^[^\s,]+(, [^\s,]+){0,3}$")],
        [literal("pattern", f"^.{{1,{COUNTED + 100}}}$")],
    ],
)
@pytest.mark.parametrize("key", [False, True])
def test_characters_of_several_spellings_are_never_a_repeated_rule(
    wanted: list[Literal], key: bool
) -> None:
    """A matcher would follow each token of several characters out of that rule, at each step: 0.1 s
    where there are 150,000 tokens, and less than 1 ms otherwise."""
    rules = Rules()
    found = emit_string(wanted, rules, name=key)
    assert found.expression is not None
    for line in pruned(rules.text(found.expression)).splitlines():
        outside = re.sub(r'"[^"]*"|\[[^]]*\]', "", line)
        assert not re.search(r"character\w*(\{|\*|\+)", outside), line


def test_a_pattern_that_is_too_large_is_dropped() -> None:
    large, small = literal("pattern", r"^(\w+\s?){1,300}$"), literal("pattern", "^a")
    found, grammar = emitted(large, small)
    assert [one for one, _ in found.dropped] == [large]
    assert accepts(grammar, '"a--"')
    assert not accepts(grammar, '"b"')


@pytest.mark.slow
def test_large_classes_are_not_repeated() -> None:
    wanted = literal("pattern", r"^\p{L}{1,60}$")
    found, grammar = emitted(wanted)
    assert [one for one, _ in found.dropped] == [wanted]
    assert accepts(grammar, '"1"')
    assert not emitted(literal("pattern", r"^\p{L}+$"))[0].dropped


@pytest.mark.parametrize(
    ("name", "yes", "no"),
    [("date", "2024-02-29", "2023-02-29"), ("ipv4", "1.2.3.4", "1.2.3.256"), ("uuid", "a" * 8, "")],
)
def test_formats(name: str, yes: str, no: str) -> None:
    grammar = emitted(literal("format", name))[1]
    opposite = emitted(literal("format", name, negated=True))[1]
    for text in (yes, no):
        assert accepts(grammar, dumped(text)) == FORMATS[name](text)
        assert accepts(opposite, dumped(text)) != FORMATS[name](text)


def test_a_format_that_cannot_be_excluded_is_dropped() -> None:
    wanted = [literal("format", "uri"), literal("format", "regex", negated=True)]
    assert [one for one, _ in emitted(*wanted)[0].dropped] == wanted[1:]


@pytest.mark.parametrize(
    ("name", "fits", "others"),
    [
        ("date-time", ["2024-02-30", "today", ""], ["2024-02-29T01:02:03Z", "2016-12-31T18:59:60-05:00"]),
        ("uri", ["no scheme", "/path"], ["http://[::1]/", "urn:a"]),
        ("email", ["nobody"], ["a@[127.0.0.1]", "a@xn--bcher-kva.example"]),
        ("hostname", ["a b", "ü.example"], ["xn--bcher-kva.example", "a." * 60 + "b"]),
    ],
)  # fmt: skip
def test_what_may_have_a_format_is_excluded_with_it(
    name: str, fits: list[str], others: list[str]
) -> None:
    lowered, grammar = emitted(literal("format", name, negated=True))
    assert not lowered.dropped
    assert all(accepts(grammar, dumped(text)) for text in fits)
    assert all(FORMATS[name](text) for text in others)
    assert not any(accepts(grammar, dumped(text)) for text in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|a)*", "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$", "^(a|b)*a(a|b){14}$"]
)
def test_matching_takes_the_same_time_for_every_byte(pattern: str) -> None:
    import xgrammar

    rules = Rules()
    grammar = compiled(emit_string([literal("pattern", pattern)], rules), rules)
    assert grammar is not None
    matcher = xgrammar.GrammarMatcher(grammar)
    body = b"x" if "x" in pattern else b"a"
    taken = []
    for piece in (b'"' + body * 499, body * 500, body * 500, body * 500):
        began = time.process_time()
        assert all(matcher.accept_token(byte) for byte in piece)
        taken.append(time.process_time() - began)
    assert sum(taken) < 1  # about 1 µs for a byte
