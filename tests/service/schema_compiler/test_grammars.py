"""Grammars that are no JSON schema, and inline tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from service.errors import GrammarError, InvalidRequest, OutputInvalid
from service.schema_compiler.grammar_checks import check_answer, check_grammar
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed, Enforcement, GrammarReport
from service.tasks.inline import InlinePrompt, inline_task
from service.types import Grammar, GrammarKind

SMALL = SchemaLimits(max_bytes=40, max_depth=3, max_regex_length=10, max_choices=3)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.JSON_SCHEMA, '{"type": "string"}'),
        (GrammarKind.REGEX, "[a-z]{1,3}"),
        (GrammarKind.EBNF, 'root ::= "a"'),
        (GrammarKind.CHOICE, '["yes", "no", "Yes"]'),
    ],
)
def test_good_grammars(kind: GrammarKind, source: str) -> None:
    check_grammar(Grammar(kind, source), SMALL)


@pytest.mark.parametrize(
    ("kind", "source", "field", "reason"),
    [
        (GrammarKind.JSON_SCHEMA, '{"type": 1}', "g.json_schema", "SCHEMA_INVALID"),
        (GrammarKind.JSON_SCHEMA, " " * 41, "g.json_schema", "SCHEMA_TOO_LARGE"),
        (GrammarKind.REGEX, "", "g.regex", "GRAMMAR_INVALID"),
        (GrammarKind.REGEX, "(", "g.regex", "GRAMMAR_INVALID"),
        (GrammarKind.REGEX, "a" * 11, "g.regex", "GRAMMAR_INVALID"),
        (GrammarKind.EBNF, " \n", "g.ebnf", "GRAMMAR_INVALID"),
        (GrammarKind.EBNF, "é" * 21, "g.ebnf", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, "[]", "g.choice.options", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, "{}", "g.choice.options", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, "[1]", "g.choice.options", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, "yes", "g.choice.options", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, '["a", " "]', "g.choice.options[1]", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, '["a", "b", "a"]', "g.choice.options[2]", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, '["a", "b", "c", "d"]', "g.choice.options", "GRAMMAR_INVALID"),
        (GrammarKind.CHOICE, json.dumps(["x" * 40]), "g.choice.options", "GRAMMAR_INVALID"),
    ],
)
def test_bad_grammars(kind: GrammarKind, source: str, field: str, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        check_grammar(Grammar(kind, source), SMALL, "g")
    assert caught.value.violations[0].field == field
    assert caught.value.reason == reason


def test_answers() -> None:
    check_answer(Grammar(GrammarKind.REGEX, "a+"), "aaa")
    check_answer(Grammar(GrammarKind.CHOICE, '["a"]'), "a")
    check_answer(Grammar(GrammarKind.EBNF, 'root ::= "a"'), "anything")
    for kind, source in ((GrammarKind.REGEX, "a+"), (GrammarKind.CHOICE, '["a"]')):
        with pytest.raises(OutputInvalid):
            check_answer(Grammar(kind, source), "a b")


def test_an_answer_too_long_for_its_pattern_is_not_given_out() -> None:
    with pytest.raises(OutputInvalid, match="bounded time"):
        check_answer(Grammar(GrammarKind.REGEX, "(?:a?){8000}"), "a" * 8000)


ENFORCED = GrammarReport(Enforcement.ENFORCED)


async def analyser(grammar: Grammar, limits: SchemaLimits) -> Analysed:
    check_grammar(grammar, limits)
    return Analysed(replace(grammar, ebnf='root ::= "a"'), ENFORCED)


async def test_an_inline_task() -> None:
    grammar = Grammar(GrammarKind.CHOICE, '["a"]')
    task = await inline_task(
        InlinePrompt("Be brief.", "Which?"), grammar, analyser, max_text_bytes=15
    )
    assert (task.system, task.user, task.needs_image) == ("Be brief.", "Which?", False)
    assert task.grammar == Grammar(GrammarKind.CHOICE, '["a"]', 'root ::= "a"')
    assert (task.report, task.grammar_field) == (ENFORCED, "task.inline.grammar.choice")
    plain = await inline_task(InlinePrompt("", "x"), None, analyser)
    assert (plain.grammar, plain.report) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("", " ", None), "task.inline.user"),
        (("aaaaaaaa", "éééé", None), "task.inline.user"),
        (("", " ", Grammar(GrammarKind.REGEX, "(")), "task.inline.user"),
        (("", "x", Grammar(GrammarKind.REGEX, "(")), "task.inline.grammar.regex"),
        (
            ("", "x", Grammar(GrammarKind.CHOICE, '["a", ""]')),
            "task.inline.grammar.choice.options[1]",
        ),
    ],
)
async def test_a_bad_inline_task(arguments: Any, field: str) -> None:
    system, user, grammar = arguments
    prompt = InlinePrompt(system, user)
    with pytest.raises(InvalidRequest) as caught:
        await inline_task(prompt, grammar, analyser, max_text_bytes=15)
    assert caught.value.violations[0].field == field
    assert caught.value.message.startswith(f"{field}: ")
