"""The dialect, its bounds, and agreement with Python's matcher where the dialects agree."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.schema_compiler.budget import Budget, BudgetExceeded
from service.schema_compiler.regex.matching import MAX_STATES, PatternError, compile_pattern

DURATION = (
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
)
"""As generators of schemas write durations of ISO 8601."""


def found(pattern: str, text: str) -> bool:
    return compile_pattern(pattern).search(text, Budget())


def whole(pattern: str, text: str) -> bool:
    return compile_pattern(pattern, whole=True).search(text, Budget())


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (r"^a$", "a", "a\n"),
        (r"^\d$", "7", "٣"),
        (r"^\D$", "٣", "7"),
        (r"^\w$", "_", "é"),
        (r"^\W$", "é", "_"),
        (r"^[\w-]+$", "a-b", "a.b"),
        (r"^[\d-x]+$", "1-x", "y"),
        (r"^[^\W]$", "a", "-"),
        (r"^\s$", "\u2003", "x"),
        (r"^.$", "é", "\u2028"),
        (r"^[.]$", ".", "a"),
        (r"^[a-c-]$", "-", "d"),
        (r"^[[&&~~]+$", "[&~", "a"),
        (r"^[^]$", "\n", ""),
        (r"a|[]", "a", "b"),
        (r"^\u00e9\u{1F600}\xe9$", "é😀é", "e"),
        (r"^\ud83d\ude00$", "😀", "x"),
        (r"^\p{Lu}\P{L}$", "É1", "e1"),
        (r"^\/\-\.\_\#$", "/-._#", "a"),
        (r"^\cJ\t\0$", "\n\t\0", "J"),
        (r"^[\b]$", "\b", "b"),
        (r"\bcat\b", "a cat.", "concat"),
        (r"x{ns}{,3}", "x{ns}{,3}", "x"),
        (r"^(?<year>\d{4})(?:-\d{2})?$", "2026-11", "20261"),
        (r"^(?P<n>a)$", "a", "b"),
        (r"^(?i:ab)c$", "ABc", "ABC"),
        (r"(?i)ab", "AB", "a"),
        (r"^a{2,}?$", "aaa", "a"),
        (r"^a{0,5000}$", "a" * 5000, "a" * 5001),
        (r"a||b", "", None),
        (r"^(?!a|bc$)", "bcd", "bc"),
        (r"^(?=.*\d)(?=.*[a-c])(?!.*!).{3}$", "x1c", "x1d"),
        (r"(^(?=a$))", "a", "ab"),
        (r"^(?i)(?!A).", "b", "a"),
        (r"(?:^(?!$))[^]*$", "\n", ""),
        (r"\A[a-z]+\Z", "abc", "abc\n"),
        (r"\Aa|b\z", "cb", "ca"),
        ("(?=a)", "ba", "b"),
        ("^a(?=a)", "aa", "ab"),
        ("^(?!a)b|c", "ac", "ab"),
        ("c|^(?!a)b", "b", "ab"),
        ("(^(?!a)b|c)", "b", "a"),
        ("^(?!a)?b", "b", "a"),
        ("(?:^(?!a)b)?", "a", None),
        ("(^)?(?!a)b", "ab", "a"),
        ("^(?=(?!a))b", "b", "ab"),
        ("^(?:(?!ab).)*$", "ba", "cab"),
        ("^(?:(?!ab)[^])*?ab", "b\nab", "ba"),
        (r"^x(?!y\b)", "xyz", "xy z"),
        ("^[a-z](?:(?!.*--)[a-z-]*[a-z])?$", "a-b", "a--b"),
        ("^(?:a(?=[^]*c)|b(?![^]*c)|c)+$", "acb", "abc"),
        (DURATION, "P3DT4H", "P"),
        (DURATION, "P1W", "P1W2D"),
        (DURATION, "PT1.5S", "P1DT"),
    ],
)
def test_dialect(pattern: str, yes: str, no: str | None) -> None:
    assert found(pattern, yes)
    assert no is None or not found(pattern, no)


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"a(?=\b)", "a look-ahead that begins with ^ or a word boundary is not supported"),
        ("a(?!b*^)", "begins with ^"),
        (r"a(?!(?:b|\B)c)", "begins with ^ or a word boundary"),
        (r"a(?=(?=\b))", "begins with ^ or a word boundary"),
        (r"a(?=(?=x)\bx)", "begins with ^ or a word boundary"),
        ("a(?=(?!y)(?:^|x))", "begins with ^"),
        (r"a(?=(?:x|)\b)", "begins with ^ or a word boundary"),
        pytest.param(
            "a(?=.{900})(?!.{800}x){2}", "too large for an automaton", marks=pytest.mark.slow
        ),
        ("^(?:(?=a.{20}b)[ab]|c)*$", "too large for an automaton"),
        ("^(?!a", "missing closing parenthesis"),
        ("a(?<!b)", "look-behind is not supported at character 2"),
        (r"(a)\1", "back-references"),
        (r"(?<n>a)\k<n>", "back-references"),
        ("(?>a)", "unsupported kind of group"),
        ("(?R)", "unsupported kind of group"),
        ("(?s)a", "unsupported kind of group"),
        ("(a", "missing closing parenthesis"),
        ("a)", "unbalanced parenthesis"),
        ("[a", "missing closing bracket"),
        ("[z-a]", "range in the wrong order at character 5"),
        ("a**", "nothing to repeat"),
        ("{2}", "nothing to repeat"),
        ("a{3,2}", "wrong order"),
        ("a\\", "nothing after the backslash"),
        (r"\q", "unknown escape"),
        (r"\ud800", "not a character"),
        (r"\p{Nonsense}", "not a valid regular expression"),
        ("(" * 101 + ")" * 101, "nested more than 100"),
        ("a" * 1025, "1025 characters"),
    ],
)
def test_refusals_say_why(pattern: str, what: str) -> None:
    with pytest.raises(PatternError, match=re.escape(what)):
        compile_pattern(pattern)


def test_whole_matches_all_of_the_text() -> None:
    assert whole("a|ab", "ab")
    assert whole("(?=a)(?!.*b).+", "ac")
    assert not whole("(?=a)(?!.*b).+", "acb")
    assert not whole("(?=a)", "a")
    assert not whole("a|b", "ab")
    assert not whole("a", "a\n")


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:" * 100 + "a" + "){1,9}" * 100,
        "((((a{1,99}){1,99}){1,99}){1,99})",
        "a{999999999}",
        r"[^a]{9999}[^b]{9999}[^c]{2}",
        r"\p{L}{9999}",
        "(?:a{0,9999}){0,9}",
    ],
)
def test_explosive_patterns_are_refused_at_once(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(PatternError, match="too large"):
        compile_pattern(pattern)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("abc", 3),
        ("[a-z]", 1),
        ("a|b", 3),
        ("ab|c|de", 7),
        ("(a|b){3}", 9),
        ("a*", 1),
        ("(ab){2,}", 4),
        ("(ab){2,5}", 10),
        ("(ab)?", 2),
        ("((a|b){2}c){3}", 21),
    ],
)
def test_states_are_counted_with_repeats_written_out(pattern: str, states: int) -> None:
    """The work of a match is taken from the budget by them."""
    assert compile_pattern(pattern).states == states


def test_the_bound_on_states() -> None:
    assert compile_pattern(f"a{{{MAX_STATES}}}").states == MAX_STATES
    with pytest.raises(PatternError):
        compile_pattern(f"a{{{MAX_STATES + 1}}}")


def test_matching_takes_from_the_budget_first() -> None:
    pattern = compile_pattern("a{100}")
    budget = Budget(steps=1100)
    assert not pattern.search("b" * 9, budget)
    assert budget.steps == 100
    with pytest.raises(BudgetExceeded):
        pattern.search("b", budget)


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:(?=" + "a" * 400 + ")a)*$",
        "(?:(?!a[ab]{18}a)[ab](?=b[ab]{17}b))*$",
        "(?=(?=(?=(?=a.{9}).{9}).{9}).{9})(?:(?!.{30}b).)*",
        "".join(f"(?=.*{letter}.{{5}}{letter})" for letter in "abcdefghij") + "x",
        "(?:" * 90 + "(?!a)b" + ")*" * 90,
    ],
)
def test_look_aheads_take_bounded_time(pattern: str) -> None:
    began = time.process_time()
    with contextlib.suppress(PatternError):
        found(pattern, "ab" * 1000)
    assert time.process_time() - began < 2


def test_look_aheads_take_from_the_budget() -> None:
    with pytest.raises(BudgetExceeded):
        compile_pattern("a(?=b)").search("a" * 100, Budget(steps=1000))


atoms = st.sampled_from(["a", "b", "[ab]", "[^a]", r"\d", "x", "(?:a|b)", "(ab)"])
quantified = st.tuples(atoms, st.sampled_from(["", "*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"]))
looks = st.builds(
    lambda sign, inner, end: (f"(?{sign}{inner}{end})", ""),
    st.sampled_from("=!"),
    quantified.map("".join),
    st.sampled_from(["", "$", "b", ".*b"]),
)
looking = st.lists(quantified | looks | st.just(("|", "")), max_size=6).map(
    lambda parts: "".join(a + q for a, q in parts)
)
patterns = st.lists(quantified | st.just(("|", "")), max_size=6).map(
    lambda parts: "".join(a + q for a, q in parts)
)


@pytest.mark.slow
@settings(max_examples=300)
@given(patterns, st.text("abx1", max_size=8))
def test_python_agrees(pattern: str, text: str) -> None:
    assert found(pattern, text) == (re.search(pattern, text) is not None)
    assert whole(pattern, text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.slow
@settings(max_examples=500)
@given(looking, looking, st.sampled_from(["", "*", "?", "{2}"]), st.text("abx1", max_size=8))
def test_python_agrees_on_look_aheads(a: str, b: str, times: str, text: str) -> None:
    pattern = f"{a}(?:{b}){times}"
    assert found(pattern, text) == (re.search(pattern, text) is not None)
    assert whole(pattern, text) == (re.fullmatch(pattern, text) is not None)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.text(r"ab()[]{}*+?|\^$.-,1&dwuxpk<>:=!" + "é", max_size=24))
def test_any_text_is_a_pattern_or_refused(pattern: str) -> None:
    with contextlib.suppress(PatternError):
        found(pattern, "ab1")
