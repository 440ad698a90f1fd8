"""The tree of a pattern, and what its sets of characters contain."""

from __future__ import annotations

import pytest

from service.schema_compiler.budget import Budget
from service.schema_compiler.regex.character_sets import resolve
from service.schema_compiler.regex.codepoints import contains
from service.schema_compiler.regex.matching import PatternError, compile_pattern
from service.schema_compiler.regex.syntax import (
    END,
    START,
    Ahead,
    Assertion,
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
    parse,
)

A, B = Chars(((97, 97),)), Chars(((98, 98),))


@pytest.mark.parametrize(
    ("pattern", "tree"),
    [
        ("", Sequence(())),
        ("a", A),
        ("^ab$", Sequence((START, A, B, END))),
        ("a|b|", Choice((A, B, Sequence(())))),
        ("(?:a|b)*", Repeat(Choice((A, B)), 0, None)),
        ("a+?b{2}", Sequence((Repeat(A, 1, None), Repeat(B, 2, 2)))),
        ("a{2,}b{0,3}", Sequence((Repeat(A, 2, None), Repeat(B, 0, 3)))),
        (r"\ba\B", Sequence((Assertion("b"), A, Assertion("B")))),
        ("(?i:a)b", Sequence((Chars(((97, 97),), fold=True), B))),
        ("b(?i)a|a", Choice((Sequence((B, Chars(((97, 97),), fold=True))), Chars(((97, 97),), fold=True)))),
        (r"\Aab\Z", Sequence((START, A, B, END))),
        (r"\Aab\z", Sequence((START, A, B, END))),
        ("(b(?i)a)a", Sequence((Sequence((B, Chars(((97, 97),), fold=True))), A))),
    ],
)  # fmt: skip
def test_trees(pattern: str, tree: Node) -> None:
    assert parse(pattern).node == tree


def test_look_aheads_are_expressions_of_their_own() -> None:
    found = parse("^(?!a)(?=b$)ab")
    assert found.aheads == (
        (Sequence((START, A)), True),
        (Sequence((START, Sequence((B, END)))), False),
    )
    assert found.node == Sequence((START, Sequence(()), Sequence(()), A, B))
    assert parse("^a(?=b)").node == Sequence((START, A, Ahead(B, negated=False)))
    assert parse("(?!a)b").node == Sequence((Ahead(A, negated=True), B))
    assert parse("(?!a)b", whole=True).aheads == ((Sequence((START, A)), True),)


@pytest.mark.parametrize(
    "pattern",
    [
        ".", "[^]", "[]", r"\d", r"\W", r"[^\W_]", "[a-z]", "[^a-z]", "(?i:[a-z])", "(?i:[^s])",
        r"(?i:\W)", r"(?i:[^\w])", r"[\s\S]", r"\s", "(?i:é)", "(?i:.)", r"[\w-.]", r"\u{1F600}",
    ],
)  # fmt: skip
def test_sets_hold_what_the_matcher_finds(pattern: str) -> None:
    chars = parse(pattern).node
    assert isinstance(chars, Chars)
    found, matcher = resolve(chars), compile_pattern(pattern, whole=True)
    for code in [*range(0x250), 0x2028, 0x202A, 0x212A, 0xFEFF, 0x1F600, 0x10FFFF]:
        assert contains(found, code) == matcher.search(chr(code), Budget()), hex(code)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [r"\p{Lu}", r"\P{L}", r"(?i:\p{Lu})", r"[\p{Greek}\d]"])
def test_properties_are_the_matchers(pattern: str) -> None:
    chars = parse(pattern).node
    assert isinstance(chars, Chars)
    found, matcher = resolve(chars), compile_pattern(pattern, whole=True)
    for code in [*range(0x3000), *range(0xFFF0, 0x10500), *range(0x10FFF0, 0x110000)]:
        assert contains(found, code) == matcher.search(chr(code), Budget()), hex(code)


def test_an_unknown_property_has_no_set() -> None:
    chars = parse(r"\p{Nonsense}").node
    assert isinstance(chars, Chars)
    with pytest.raises(PatternError):
        resolve(chars)
