"""Grammars tried out in a process of their own: what it finds, and what a grammar does to it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lmdeploy_ext.grammars import trials
from lmdeploy_ext.grammars.trials import Trials, TrialsUnavailable

pytestmark = pytest.mark.slow  # starts processes


@pytest.fixture(scope="module")
def shared() -> Iterator[Trials]:
    found = Trials(limit_s=30)
    yield found
    found.close()


def of_schema(found: Trials, schema: Any) -> trials.Problem | None:
    return found.problem("json_schema", json.dumps(schema))


USABLE = [
    True,
    {"type": "object", "additionalProperties": True},
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/b"}},
        "$defs": {"b": {"type": "null"}},
    },
    {
        "type": "string",
        "pattern": r"^a\-b\_c$",
    },  # of which xgrammar says that it takes it literally
    {"type": "string", "maxLength": 100_000},
    {"allOf": [{"type": "integer"}]},
]


@pytest.mark.parametrize("schema", USABLE, ids=str)
def test_a_usable_schema(shared: Trials, schema: Any) -> None:
    assert of_schema(shared, schema) is None


UNUSABLE: list[tuple[Any, str]] = [
    ({"type": "strnig"}, 'cannot be compiled: Unsupported type "strnig"'),
    ({"$ref": "#/$defs/none"}, "cannot be compiled: Cannot find field $defs"),
    (False, "cannot be compiled: Schema 'false' cannot accept any value"),
    ({"$ref": "https://a/b"}, "would not be enforced as it is: URI should either be"),
    ({"type": "string", "pattern": "(?=a)b"}, "would not be enforced as it is: Lookahead"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "would not be enforced as it is: pattern"),
    ({"type": "number", "multipleOf": 0.5}, "would not be enforced as it is: multipleOf"),
    ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "would not be enforced as it is: Support"),
]


@pytest.mark.parametrize(("schema", "said"), UNUSABLE, ids=str)
def test_an_unusable_schema(shared: Trials, schema: Any, said: str) -> None:
    problem = of_schema(shared, schema)
    assert problem is not None
    reason, description = problem
    assert reason == "SCHEMA_UNSUPPORTED"
    assert description.startswith(said)
    assert ".cc:" not in description


def test_expressions_and_structural_tags(shared: Trials) -> None:
    assert shared.problem("regex_schema", "(left|right)") is None
    assert shared.problem("regex_schema", "(") == (
        "GRAMMAR_INVALID",
        "cannot be compiled: Regex parsing error at position 2: The parenthesis is not closed.",
    )
    assert shared.problem("regex_schema", r"[^\s\S]") == ("GRAMMAR_INVALID", "matches no text")
    tag = {"type": "structural_tag", "format": {"type": "grammar", "grammar": 'root ::= "a"'}}
    assert shared.problem("structural_tag", json.dumps(tag)) is None
    assert shared.problem("structural_tag", "{}") is not None


def test_a_warning_is_not_held_against_the_next_grammar(shared: Trials) -> None:
    assert of_schema(shared, {"$ref": "https://c/d"}) is not None
    assert of_schema(shared, {"type": "integer"}) is None


def test_a_result_is_remembered(shared: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    schema, other = {"type": "array", "minItems": 7}, {"type": "strange"}
    first = of_schema(shared, schema), of_schema(shared, other)
    monkeypatch.setattr(shared, "_tried", lambda *_: pytest.fail("it was tried out again"))
    assert (of_schema(shared, schema), of_schema(shared, other)) == first


def test_old_results_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "REMEMBERED", 2)
    found = Trials()
    tried: list[str] = []
    monkeypatch.setattr(found, "_tried", lambda kind, source: tried.append(source))
    for source in ("a", "b", "a", "c", "a", "b"):
        found.problem("regex_schema", source)
    assert tried == ["a", "b", "c", "b"]


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


def test_a_grammar_that_takes_too_long_ends_only_its_process() -> None:
    found = Trials(limit_s=1)
    try:
        problem = of_schema(found, nested(400))
        assert problem is not None
        assert problem[0] == "GRAMMAR_TOO_COSTLY"
        assert problem[1].startswith("takes more than 1 seconds")
        assert of_schema(found, {"type": "integer"}) is None
    finally:
        found.close()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGSEGV, "GRAMMAR_INVALID"), (signal.SIGKILL, "GRAMMAR_TOO_COSTLY")],
)
def test_a_process_that_dies_is_replaced(
    number: signal.Signals, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Trials()
    try:
        assert of_schema(found, {"type": "integer"}) is None
        process = found._process
        assert process is not None
        read = trials._read

        def killed(process: Any, limit_s: float) -> Any:
            os.kill(process.pid, number)  # before it can answer
            os.kill(process.pid, signal.SIGCONT)
            monkeypatch.setattr(trials, "_read", read)
            return read(process, limit_s)

        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(trials, "_read", killed)
        problem = of_schema(found, {"type": "null"})
        assert problem is not None
        assert problem[0] == reason
        assert of_schema(found, {"type": "boolean"}) is None
        assert found._process is not process
    finally:
        found.close()


def test_the_process_ends_with_its_server() -> None:
    found = Trials()
    assert of_schema(found, {"type": "integer"}) is None
    process = found._process
    assert process is not None
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()  # as the system does when the server ends
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_process_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Trials()
    monkeypatch.setattr(trials, "_COMMAND", ("/bin/false",))
    for _ in range(2):
        with pytest.raises(TrialsUnavailable, match="does not start"):
            of_schema(found, {"type": "integer"})
