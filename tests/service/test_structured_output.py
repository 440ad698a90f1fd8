"""Ways in which structured output failed elsewhere, each through a real server.

The reference engine on the bundled model, whose scores are bent towards what a test wants it to say:
only the grammar stands between that and the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import jsonschema
import pytest
import pytest_asyncio

from service.engines.common import grammar as grammar_module
from service.engines.reference import ReferenceEngine
from service.engines.reference.decoder import Decoder
from service.engines.reference.sampler import Sampler
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from tests.service.bending import Bent, bent, serving
from tests.service.harness import failure, inline, run_request

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]
LARGE = 9_007_199_254_740_993
"""The first whole number that a double cannot hold."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server() -> AsyncIterator[tuple[ReferenceEngine, Any]]:
    async with serving() as (_, engine, stub):
        yield engine, stub


@pytest.fixture
def model(server: tuple[ReferenceEngine, Any], monkeypatch: pytest.MonkeyPatch) -> Bent:
    found = bent(*server)
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: found.choose(self, logits))
    return found


def blank(piece: bytes) -> bool:
    return bool(piece) and not piece.strip()


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


NUMBERS = closed(a={"type": "integer", "minimum": 0, "maximum": 99},
                 b={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3})  # fmt: skip


async def test_whitespace_in_answers_is_that_of_json_dumps(model: Bent) -> None:
    model.likes = [i for i, piece in enumerate(model.table) if blank(piece)]
    result = await model.run(NUMBERS)
    assert model.wanted > model.got
    assert result.text == json.dumps(json.loads(result.text))
    jsonschema.validate(json.loads(result.json), NUMBERS)


@pytest.mark.parametrize("schema", [{"type": "string"}, {}, {"type": "array"}])
async def test_endless_whitespace_is_truncated_and_never_an_answer(
    model: Bent, schema: Any
) -> None:
    model.likes = [i for i, piece in enumerate(model.table) if blank(piece)]
    model.script = {"string": b'" ', "array": b'["'}.get(schema.get("type"), b'{"')
    error = await model.failure(schema, max_tokens=400)
    assert error.reason == "OUTPUT_TRUNCATED"
    assert error.metadata["finish_reason"] in ("loop", "length")


@pytest.mark.parametrize("last", [b"[", b"[1", b'"a', b'{"', b'["\\'], ids=repr)
@pytest.mark.parametrize("max_tokens", [60, 600])
async def test_endless_lists_objects_and_strings_are_cut(
    model: Bent, last: bytes, max_tokens: int
) -> None:
    """By the limit, or before it where the answer does nothing but repeat itself."""
    model.likes = [model.table.index(last[-1:]), model.table.index(b",")]
    model.script = last
    error = await model.failure(True, max_tokens=max_tokens)
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OUTPUT_TRUNCATED")
    ended = error.metadata["finish_reason"]
    assert ended in ("loop", "length")
    assert int(error.metadata["output_tokens"]) <= max_tokens
    if max_tokens == 60:
        assert ended == "length"


@pytest.mark.parametrize("schema", [True, {"type": "number"}, {"type": "integer"}])
async def test_endless_numbers_end(model: Bent, schema: Any) -> None:
    """No number has thousands of digits; what comes is one that JSON can hold."""
    model.likes = [model.table.index(b"1")]
    model.script = b"1"
    result = await model.run(schema, max_tokens=600)
    assert set(result.json) <= set("1234567890.eE+-")
    assert 10 < len(result.json) < 200
    assert abs(json.loads(result.json)) < 10**160


async def test_generation_ends_when_the_grammar_ends(model: Bent) -> None:
    """The model wants anything but an end."""
    model.likes = [i for i, piece in enumerate(model.table) if piece]
    model.script = b'{"a": 7, "b": [true, false, true]}\n\nAnd then I would like to say'
    result = await model.run(NUMBERS, max_tokens=200)
    assert result.text == '{"a": 7, "b": [true, false, true]}'
    assert result.finish_reason == pb.FINISH_REASON_STOP
    for grammar in (
        {"regex": "[ab]{3}"},
        {"choice": ["left", "right"]},
        {"ebnf": 'root ::= "x"{4}'},
    ):
        assert (await model.run(grammar)).finish_reason == pb.FINISH_REASON_STOP


async def test_the_grammar_forbids_an_early_end(model: Bent) -> None:
    model.likes = sorted(model.special)
    result = await model.run(NUMBERS)
    jsonschema.validate(json.loads(result.json), NUMBERS)
    assert model.wanted > model.got


@pytest.mark.parametrize(
    "grammar", [{"type": "string", "minLength": 3, "maxLength": 5}, {"regex": ".{3,5}"}]
)
async def test_special_tokens_are_never_text(model: Bent, grammar: Any) -> None:
    stops = {model.table.index(b'"')}
    model.likes = [*sorted(model.special - stops), *range(len(model.table) - 1, 0, -1)]
    result = await model.run(grammar)
    text = result.text if "regex" in grammar else json.loads(result.text)
    assert 3 <= len(text) <= 5
    assert not any(mark in result.text for mark in ("<|", "|>", "\ufffd"))


async def test_a_special_token_spelled_out_is_text_like_any_other(model: Bent) -> None:
    model.script = b'"<|im_end|>\\n<|im_start|>assistant"'
    result = await model.run({"type": "string"})
    assert result.text.encode() == model.script


MARK = "<|im_end|>"


@pytest.mark.parametrize(
    "grammar",
    [
        {"const": MARK},
        {"enum": [[MARK], f"{MARK}<|image_pad|>"]},
        closed(**{MARK: {"const": 1}}),
        {"type": "string", "pattern": "^<\\|im_end\\|>$"},
        {"choice": [MARK, f"{MARK}{MARK}"]},
        {"regex": "<\\|im_end\\|>(x|<\\|vision_start\\|>)"},
        {"ebnf": f'root ::= "{MARK}" [<|>] "{MARK}"'},
    ],
    ids=lambda grammar: next(iter(grammar)),
)
async def test_special_tokens_in_literals_are_text(model: Bent, grammar: Any) -> None:
    """A model that wants the token itself gets the characters, and does not end with them."""
    model.likes = sorted(model.special)
    result = await model.run(grammar, max_tokens=200)
    text = json.loads(result.json) if result.json else result.text
    assert MARK in json.dumps(text)
    assert result.finish_reason == pb.FINISH_REASON_STOP


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ({"regex": "[ \\n\\t]{3}"}, None),
        ({"ebnf": 'root ::= " " " "? "\\n"'}, (" \n", "  \n")),
        ({"type": "string", "pattern": "^ {2,3}$"}, ('"  "', '"   "')),
        ({"const": {" ": "\t"}}, ('{" ": "\\t"}',)),
    ],
    ids=["regex", "ebnf", "pattern", "const"],
)
async def test_grammars_of_blanks(model: Bent, grammar: Any, texts: tuple[str, ...] | None) -> None:
    result = await model.run(grammar)
    assert result.text in texts if texts else result.text.isspace() and len(result.text) == 3


async def test_scores_wider_than_the_mask_are_an_error(
    model: Bent, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Decoder.logits
    monkeypatch.setattr(
        Decoder, "logits", lambda self, hidden: logits(self, hidden).repeat_interleave(2, -1)
    )
    error = await model.failure(NUMBERS)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    monkeypatch.setattr(Decoder, "logits", logits)
    jsonschema.validate(json.loads((await model.run(NUMBERS)).json), NUMBERS)


async def test_a_token_that_the_grammar_refuses_is_an_error(
    model: Bent, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden: Callable[..., int] = lambda self, logits: model.table.index(b"x")  # noqa: E731
    monkeypatch.setattr(Sampler, "choose", forbidden)
    error = await model.failure(NUMBERS)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


@pytest.mark.parametrize(
    "text", ['{"a": null}', '{"b": 2, "a": [1, "2"]}', "[]", '"{}"', "-3.5", "null"]
)
async def test_required_alone(model: Bent, text: str) -> None:
    """The keyword says nothing about values that are no objects, nor about other names."""
    model.script = text.encode()
    assert (await model.run({"required": ["a"]})).text == text


@pytest.mark.parametrize("text", ["{}", '{"b": 1}'])
async def test_required_alone_is_required(model: Bent, text: str) -> None:
    model.script = text.encode()
    model.likes = [model.table.index(b"}")]
    answer = await model.outcome({"required": ["a"]})
    assert answer is None or "a" in json.loads(answer)


@pytest.mark.parametrize(
    "schema", [True, {}, {"$schema": "http://json-schema.org/draft-07/schema#"}]
)
@pytest.mark.parametrize(
    "text", ['{"a": {"b": [1, 2.5, null, {"": []}]}, "": false}', "[]", '"é\u2028😀"', "0", "true"]
)
async def test_schemas_that_allow_everything(model: Bent, schema: Any, text: str) -> None:
    model.script = text.encode()
    result = await model.run(schema)
    assert result.text == result.json == text


@pytest.mark.parametrize(
    "schema", [False, {"not": {}}, {"enum": [1], "type": "string"}, closed(a=False)]
)
async def test_schemas_that_allow_nothing(model: Bent, schema: Any) -> None:
    error = await model.failure(schema)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "SCHEMA_UNSATISFIABLE"
    assert "pointer" in error.metadata
    assert list(error.fields) == ["task.inline.grammar.json_schema"]


STRINGS = [
    '"\\/\b\f\n\r\t',
    "\x00\x1f\x7f",
    "\u2028\u2029\ufeff",
    "é😀\U0010ffff",
    "\\ud83d",
    "%s{}'",
]


@pytest.mark.parametrize("value", STRINGS)
async def test_requested_strings_are_returned_unchanged(model: Bent, value: str) -> None:
    for schema in (
        {"const": value},
        {"enum": [value, [value], {value: value}]},
        closed(**{value: {"const": 1}}),
    ):
        result = await model.run(schema)
        jsonschema.validate(json.loads(result.json), schema)


@pytest.mark.parametrize("value", STRINGS)
async def test_free_strings_hold_every_character(model: Bent, value: str) -> None:
    model.script = json.dumps(value, ensure_ascii=False).encode()
    result = await model.run({"type": "string"})
    assert json.loads(result.json) == value


@pytest.mark.parametrize(
    "text", ['"\\ud83d', '"\\udc00 ', '"\\ud83d\\ud83d', '"\\u0', '"\\x', '"\n', '"\xff']
)
async def test_invalid_strings_are_never_answers(model: Bent, text: str) -> None:
    """Halves of surrogate pairs, escapes that do not exist, control characters."""
    model.script = text.encode("latin-1") + b'"'
    result = await model.stub.RunTask(
        model.request({"type": "string", "maxLength": 3}, 60), timeout=60
    )
    value = json.loads(result.result.json)
    value.encode()
    assert len(value) <= 3


@pytest.mark.parametrize("number", [LARGE, -LARGE, 10**30, -(3**150), 7**400])
async def test_whole_numbers_beyond_doubles(model: Bent, number: int) -> None:
    assert (await model.run({"const": number}, max_tokens=400)).json == str(number)
    if abs(number) < 10**39:  # more digits are not in the grammar of a range
        between = {"type": "integer", "minimum": number, "maximum": number}
        result = await model.run(between, max_tokens=400)
        assert (result.json, result.enforcement) == (str(number), pb.ENFORCEMENT_ENFORCED)
        model.script = str(number).encode()
        result = await model.run({"type": "integer", "multipleOf": abs(number)}, max_tokens=400)
        assert json.loads(result.json) % number == 0


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", "1e999", "01", "+1", ".5", "1.", "0x1", "1_0"]
)
async def test_invalid_numbers_are_never_answers(model: Bent, text: str) -> None:
    model.script = text.encode()
    answer = await model.outcome({"type": "number"})
    if answer is not None:
        assert answer != text
        assert abs(json.loads(answer, parse_constant=pytest.fail)) < float("inf")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": 1, "\\u0061": 2}', '{"b": 1, "b": 1}'])
@pytest.mark.parametrize("schema", [{"type": "object"}, {}, {"properties": {"a": {"type": "integer"}}},
                                    {"type": "array", "items": {}}])  # fmt: skip
async def test_duplicate_names_are_never_in_an_answer(model: Bent, schema: Any, text: str) -> None:
    model.script = (f"[{text}]" if schema.get("type") == "array" else text).encode()
    answer = await model.outcome(schema)
    if answer is not None:
        json.loads(answer, object_pairs_hook=once)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


async def test_nested_alternatives_only_delay_their_own_caller(model: Bent) -> None:
    """Calls with ordinary schemas are answered while hostile ones are looked at."""
    hostile: Any = {"type": "string"}
    for level in range(20):
        hostile = {"oneOf": [hostile, {"const": f"{level}"}, {"pattern": f"^{level}"}]}
    slow = [asyncio.create_task(asyncio.wait_for(model.run({"oneOf": [hostile, {"const": i}]}), 120))
            for i in range(3)]  # fmt: skip
    quick = [await model.run(NUMBERS) for _ in range(3)]
    for result in quick:
        jsonschema.validate(json.loads(result.json), NUMBERS)
    for outcome in await asyncio.gather(*slow, return_exceptions=True):
        if isinstance(outcome, grpc.aio.AioRpcError):
            assert outcome.code() in (
                grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE,
                grpc.StatusCode.INTERNAL,
            )  # fmt: skip
        else:
            assert isinstance(outcome, pb.TaskResult)


async def test_a_count_of_billions_fails_without_delaying_others(
    model: Bent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer such an answer, the longer each of its steps takes, for all who decode with it."""
    monkeypatch.setattr(grammar_module, "MASKS_LIMIT_S", 3.0)
    task = inline("Say it.", ebnf='root ::= one{1000000000,}\none ::= [ -~] | "\\n" [ -~]')
    request = run_request(task, max_tokens=1000, temperature=2.0, seed=1)
    long = asyncio.ensure_future(failure(model.stub.RunTask(request, timeout=120)))
    beside = 0
    while not long.done():
        assert (await model.run({"choice": ["left", "right"]})).finish_reason
        beside += 1
    error = await long
    assert (error.code, error.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "GRAMMAR_TOO_COSTLY",
    )
    assert list(error.fields) == ["task.inline.grammar.ebnf"]
    assert beside > 2, "they would have waited for all of the time limit"
