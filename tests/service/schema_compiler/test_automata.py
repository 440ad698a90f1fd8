"""Automata against the matcher, their size, and their bounds."""

from __future__ import annotations

import time

import pytest

from service.schema_compiler.budget import Budget
from service.schema_compiler.regex.dfa import (
    DEAD,
    MAX_EFFORT,
    Dfa,
    Effort,
    TooLarge,
    bounded,
    excluding,
    minimal,
    negation,
    product,
)
from service.schema_compiler.regex.matching import compile_pattern
from service.schema_compiler.regex.nfa import Alphabet, determinised
from service.schema_compiler.regex.syntax import parse


def made(pattern: str, *, whole: bool = False) -> tuple[Dfa, Alphabet]:
    node = parse(pattern).node
    alphabet = Alphabet([node], "abcx_ ")
    return determinised(node, alphabet, Effort(), whole=whole), alphabet


def accepted(dfa: Dfa, text: list[int]) -> bool:
    state = 0
    for block in text:
        state = dfa.edges[state][block]
        if state == DEAD:
            return False
    return dfa.accepting[state]


def texts(length: int = 4) -> list[str]:
    found = [""]
    for text in found:
        if len(text) < length:
            found += [text + character for character in "abx_ "]
    return found


@pytest.mark.parametrize(
    "pattern",
    [
        "a", "^a", "a$", "^a$", "a|^b$", "^(a|b)*x$", "a^b", "(a$|^x)b?", r"\bab\b", r"\Ba", r"a\b ",
        "(^|a)b($|x)", "(a*)*x", "(a|ab)(x|bx)", "a{2,3}", "(ab?){2}", "^$", "[]", "(^a?|x)*b", "",
    ],
)  # fmt: skip
def test_an_automaton_finds_what_the_matcher_finds(pattern: str) -> None:
    for whole in (False, True):
        dfa, alphabet = made(pattern, whole=whole)
        matcher = compile_pattern(pattern, whole=whole)
        for text in texts():
            assert accepted(dfa, alphabet.spelled(text)) == matcher.search(text, Budget()), text


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("(a*)*", 1),
        ("(x+x+)+y", 4),
        ("^(a|b)*a(a|b){3}$", 16),
        ("^(ab|cb)$", 3),
        ("[]", 1),
        ("abc", 4),
    ],
)
def test_automata_are_minimal(pattern: str, states: int) -> None:
    assert len(made(pattern)[0].edges) == states


def test_combinations() -> None:
    dfa, alphabet = made("^[ab]*$")
    names = [alphabet.spelled(text) for text in ("a", "ab", "x")]
    others = excluding(alphabet.blocks, names, Effort())
    found = bounded(product(dfa, others, Effort()), 1, 3, Effort())
    wanted = {t for t in texts() if set(t) <= {"a", "b"} and 1 <= len(t) <= 3} - {"a", "ab", "x"}
    assert {t for t in texts() if accepted(found, alphabet.spelled(t))} == wanted
    rest = negation(found, Effort())
    assert {t for t in texts() if not accepted(rest, alphabet.spelled(t))} == wanted
    assert product(found, rest, Effort()).is_empty


@pytest.mark.parametrize(
    "pattern", ["a", "^a", "^a$", "^(a|b)*x$", r"\bab\b", "a{2,3}", "(ab?){2}", "^$", "[]", ""]
)
def test_negations_are_minimal(pattern: str) -> None:
    dfa, alphabet = made(pattern)
    found = negation(dfa, Effort())
    assert minimal(found) == found
    assert negation(found, Effort()) == dfa
    for text in map(alphabet.spelled, texts()):
        assert accepted(found, text) != accepted(dfa, text)


@pytest.mark.parametrize(
    ("pattern", "shortest", "longest"),
    [("^a{2,5}$", 2, 5), ("^a+$", 1, None), ("b", 1, None), ("^(ab?|abx)$", 1, 3)],
)
def test_lengths(pattern: str, shortest: int, longest: int | None) -> None:
    assert made(pattern)[0].lengths() == (shortest, longest)


@pytest.mark.parametrize(
    "pattern",
    [
        "^(a|b)*a(a|b){14}$",
        "^(([a-z]{1,50}){1,50})$",
        "a{5000}",
        "((a{0,70}){0,70}){0,4}",
    ],
)
def test_what_explodes_is_given_up_soon(pattern: str) -> None:
    effort = Effort()
    began = time.process_time()
    with pytest.raises(TooLarge):
        determinised(parse(pattern).node, Alphabet([parse(pattern).node]), effort)
    assert time.process_time() - began < 2  # about 0.1
    assert effort.left >= -MAX_EFFORT
