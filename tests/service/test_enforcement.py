"""What is enforced, told before and with an answer; strict calls; another attempt at an answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.engines.fake import PIECE, FakeEngine
from service.inference.budgets import MAX_VALIDATIONS
from service.inference.calls import ANALYZE_TASK
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import Analysed, Enforcement, GrammarReport
from service.types import Enforcer, GenerateRequest, Grammar, GrammarKind, Sampling
from tests.service.harness import (
    failure,
    image_bytes,
    inline,
    run_request,
    running,
    stream_failure,
    until,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SCHEMA_FIELD = "task.inline.grammar.json_schema"
ENFORCED = json.dumps(
    {
        "title": "Point",
        "type": "object",
        "additionalProperties": False,
        "required": ["x"],
        "properties": {"x": {"type": "integer", "minimum": 0}},
    }
)
CHECKED = json.dumps(
    {
        "type": "object",
        "additionalProperties": False,
        "required": ["tags"],
        "properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}},
    }
)
POINTER = "/properties/tags/uniqueItems"
GOOD, BAD = '{"tags": ["a", "b"]}', '{"tags": ["a", "a"]}'
PIECES = len(PIECE.findall(GOOD))


MISSPELT = json.dumps(
    {"type": "object", "additionalProperties": False, "propertes": {"x": {"type": "integer"}}}
)


def many(count: int) -> str:
    """A schema with this many CHECKED keywords."""
    item = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    names = {f"list-{index}": item for index in range(count)}
    return json.dumps({"type": "object", "additionalProperties": False, "properties": names})


class Script:
    """An answer for each attempt; the last one goes on. Remembers the requests."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers
        self.requests: list[GenerateRequest] = []

    def __call__(self, request: GenerateRequest) -> str:
        if request.request_id != "warm-up":
            self.requests.append(request)
        return self.answers[min(len(self.requests), len(self.answers)) - 1]

    @property
    def seeds(self) -> list[int | None]:
        return [request.sampling.seed for request in self.requests]


def checked_request(**options: Any) -> pb.RunTaskRequest:
    return run_request(inline(json_schema=CHECKED), **{"temperature": 1.0, **options})


def strictly(request: pb.RunTaskRequest) -> pb.RunTaskRequest:
    request.strict = True
    return request


def streamed(request: pb.RunTaskRequest) -> pb.StreamTaskRequest:
    return pb.StreamTaskRequest.FromString(request.SerializeToString())


# What a result says


async def test_a_result_names_what_is_only_checked() -> None:
    async with running(FakeEngine(GOOD)) as started:
        result = (await started.stub.RunTask(checked_request(), timeout=60)).result
        events = started.stub.StreamTask(streamed(checked_request()), timeout=60)
        last = [event async for event in events][-1].result
    for found in (result, last):
        assert found.enforcement == pb.ENFORCEMENT_CHECKED
        (keyword,) = found.checked
        assert (keyword.pointer, keyword.keyword) == (POINTER, "uniqueItems")
        assert keyword.enforcement == pb.ENFORCEMENT_CHECKED
        assert keyword.reason
        assert (found.checked_omitted, found.attempts) == (0, 1)


@pytest.mark.parametrize(
    ("grammar", "enforcement"),
    [
        ({"json_schema": ENFORCED}, pb.ENFORCEMENT_ENFORCED),
        ({"choice": ["yes", "no"]}, pb.ENFORCEMENT_ENFORCED),
        ({"ebnf": 'root ::= "fake"'}, pb.ENFORCEMENT_ENFORCED),
        ({"regex": "[a-z]{4}"}, pb.ENFORCEMENT_ENFORCED),
        ({}, pb.ENFORCEMENT_UNSPECIFIED),
    ],
    ids=["schema", "choice", "ebnf", "regex", "none"],
)
async def test_an_enforced_result_lists_no_keywords(
    grammar: dict[str, Any], enforcement: pb.Enforcement.ValueType
) -> None:
    """Annotations are in no result; without a grammar there is no class. Strict takes all of these."""
    async with running() as started:
        request = strictly(run_request(inline(**grammar)))
        result = (await started.stub.RunTask(request, timeout=60)).result
    assert (result.enforcement, list(result.checked)) == (enforcement, [])


async def test_a_task_says_what_is_enforced(tmp_path: Path) -> None:
    text = f"description: d\nuser: u\njson_schema: '{CHECKED}'"
    (tmp_path / "tags.yaml").write_text(text)
    (tmp_path / "plain.yaml").write_text("description: d\nuser: u")
    async with running(FakeEngine(GOOD), tasks_dir=tmp_path) as started:
        tasks = (await started.stub.ListTasks(pb.ListTasksRequest(), timeout=60)).tasks
        known = {task.name: task for task in tasks}
        result = await started.stub.RunTask(run_request(pb.Task(name="tags")), timeout=60)
        strict = strictly(run_request(pb.Task(name="tags")))
        error = await failure(started.stub.RunTask(strict, timeout=60))
    assert known[ANALYZE_TASK].enforcement == pb.ENFORCEMENT_ENFORCED
    assert known["plain"].enforcement == pb.ENFORCEMENT_UNSPECIFIED
    assert known["tags"].enforcement == pb.ENFORCEMENT_CHECKED
    assert [one.pointer for one in known["tags"].checked] == [POINTER]
    assert list(result.result.checked) == list(known["tags"].checked)
    assert json.loads(known["tags"].grammar.json_schema) == json.loads(CHECKED)
    assert (error.reason, list(error.fields)) == ("SCHEMA_NOT_ENFORCED", ["task.name"])
    assert POINTER in error.message


# Strict


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_strict_refuses_what_is_only_checked(method: str) -> None:
    async with running(FakeEngine(GOOD)) as started:
        before = started.engine.finished_requests
        request = strictly(checked_request())
        if method == "RunTask":
            error = await failure(started.stub.RunTask(request, timeout=60))
        else:
            events, error = await stream_failure(
                started.stub.StreamTask(streamed(request), timeout=60)
            )
            assert events == []
        assert started.engine.finished_requests == before
    assert (error.code, error.reason) == (INVALID, "SCHEMA_NOT_ENFORCED")
    ((field, text),) = error.field_violations
    assert field == SCHEMA_FIELD
    assert text.startswith(f'at "{POINTER}": ')
    assert error.message.startswith(f"{SCHEMA_FIELD}: is not fully enforced")
    assert "strict" in error.message
    assert error.metadata["checked"] == "1"


@pytest.mark.parametrize(("count", "least"), [(3, 3), (40, 5)])
async def test_strict_names_as_many_keywords_as_fit_and_counts_them(count: int, least: int) -> None:
    async with running() as started:
        request = strictly(run_request(inline(json_schema=many(count))))
        error = await failure(started.stub.RunTask(request, timeout=60))
    assert error.reason == "SCHEMA_NOT_ENFORCED"
    assert least <= len(error.field_violations) <= min(count, 16)
    pointers = [f"/properties/list-{index}/uniqueItems" for index in range(count)]
    for pointer, (field, text) in zip(pointers, error.field_violations, strict=False):
        assert field == SCHEMA_FIELD
        assert text.startswith(f'at "{pointer}": ')
    assert error.metadata["checked"] == str(count)
    assert f"{count} keywords are only checked" in error.message


# Another attempt


async def test_a_second_attempt_can_succeed() -> None:
    script = Script(BAD, GOOD)
    async with running(FakeEngine(script)) as started:
        result = (await started.stub.RunTask(checked_request(seed=7), timeout=60)).result
        once = (await started.stub.RunTask(checked_request(), timeout=60)).result
    assert (result.text, result.json, result.attempts) == (GOOD, GOOD, 2)
    assert once.attempts == 1
    first, second, _ = script.requests
    assert (first.user, first.grammar) == (second.user, second.grammar)
    assert result.usage.prompt_tokens == 2 * once.usage.prompt_tokens > 0
    assert result.usage.output_tokens == 2 * once.usage.output_tokens == 2 * PIECES
    assert result.timings.total_seconds >= result.timings.first_token_seconds > 0


async def test_the_seeds_of_attempts_follow_from_the_first() -> None:
    async def seeds(**options: Any) -> list[int | None]:
        script = Script(BAD, BAD, GOOD)
        async with running(FakeEngine(script), output_retries=2) as started:
            await started.stub.RunTask(checked_request(**options), timeout=60)
        return script.seeds

    seven = await seeds(seed=7)
    assert seven[0] == 7
    assert len(set(seven)) == 3
    assert seven == await seeds(seed=7)
    assert not set(seven) & set(await seeds(seed=8))
    assert await seeds() == [None, None, None], "the engine draws one for each"


@pytest.mark.parametrize("retries", [0, 1, 5])
async def test_the_number_of_attempts_is_limited(retries: int) -> None:
    script = Script(BAD)
    async with running(FakeEngine(script), output_retries=retries) as started:
        error = await failure(started.stub.RunTask(checked_request(), timeout=60))
        model = await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
    assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "OUTPUT_INVALID")
    assert (error.metadata["pointer"], error.metadata["keyword"]) == ("/tags", "uniqueItems")
    assert error.metadata["attempts"] == str(retries + 1) == str(len(script.requests))
    assert model.limits.output_retries == retries


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (run_request(inline(json_schema=ENFORCED), temperature=1.0), "{}"),
        (run_request(inline(choice=["a", "b"]), temperature=1.0), "c"),
        (run_request(temperature=1.0), " "),
    ],
    ids=["enforced", "choice", "no grammar"],
)
async def test_no_second_attempt_if_the_answer_would_be_the_same(
    request_: pb.RunTaskRequest, answer: str
) -> None:
    script = Script(answer)
    async with running(FakeEngine(script), output_retries=3) as started:
        error = await failure(started.stub.RunTask(request_, timeout=60))
    assert (error.reason, error.metadata["attempts"]) == ("OUTPUT_INVALID", "1")
    assert len(script.requests) == 1


async def test_a_greedy_answer_is_sampled_the_second_time() -> None:
    """As the model card has it, except for what the caller sets, and the same in each call."""

    async def second(**options: Any) -> Sampling:
        script = Script(BAD, GOOD)
        async with running(FakeEngine(script)) as started:
            request = run_request(inline(json_schema=CHECKED), **options)
            result = (await started.stub.RunTask(request, timeout=60)).result
        assert (result.text, result.attempts) == (GOOD, 2)
        greedy, sampled = (request.sampling for request in script.requests)
        assert greedy.temperature == 0
        return sampled

    found = await second()
    assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == (0.7, 0.8, 20, None)
    assert found.seed is not None
    assert found == await second(temperature=0)
    own = await second(seed=5, top_p=0.5, top_k=3, max_tokens=50, repetition_penalty=1.1)
    assert own.seed != found.seed
    assert own == replace(
        found, seed=own.seed, top_p=0.5, top_k=3, max_tokens=50, repetition_penalty=1.1
    )


async def test_an_engine_that_can_only_be_greedy_is_not_asked_again() -> None:
    script = Script(BAD, GOOD)
    async with running(FakeEngine(script, sampling_options=["max_tokens"])) as started:
        request = run_request(inline(json_schema=CHECKED))
        error = await failure(started.stub.RunTask(request, timeout=60))
    assert (error.reason, error.metadata["attempts"]) == ("OUTPUT_INVALID", "1")
    assert len(script.requests) == 1


async def test_the_error_says_how_to_get_another_attempt() -> None:
    async with running(FakeEngine(BAD), output_retries=0) as started:
        error = await failure(started.stub.RunTask(checked_request(), timeout=60))
        assert "A temperature above 0 with another seed" in error.message
        call = started.stub.StreamTask(streamed(checked_request()), timeout=60)
        assert "a call without streaming" in (await stream_failure(call))[1].message
    async with running(FakeEngine(BAD), output_retries=2) as started:
        error = await failure(started.stub.RunTask(checked_request(), timeout=60))
        assert "All 3 attempts failed; another seed" in error.message
    async with running(FakeEngine("{}")) as started:  # the grammar rules that out
        request = run_request(inline(json_schema=ENFORCED))
        error = await failure(started.stub.RunTask(request, timeout=60))
        assert error.message.endswith("(required).")


async def test_generation_ends_with_a_violation_that_nothing_can_mend() -> None:
    """The answer would go on for 4,000 tokens; nobody pays for them."""
    long = '{"tags": ["a", "a"' + ', "b"' * 1000
    engine = FakeEngine(long)
    async with running(engine, output_retries=1) as started:
        error = await failure(started.stub.RunTask(checked_request(max_tokens=5000), timeout=30))
        assert (error.metadata["pointer"], error.metadata["keyword"]) == ("/tags", "uniqueItems")
        assert error.metadata["attempts"] == "2"
        assert 1 < int(error.metadata["output_tokens"]) < 20
        assert f"ended after {error.metadata['output_tokens']} tokens" in error.message
        request = streamed(checked_request(max_tokens=5000))
        events, error = await stream_failure(started.stub.StreamTask(request, timeout=30))
        assert 1 < len(events) < 20
        assert error.reason == "OUTPUT_INVALID"
        await until(lambda: engine.active_requests == 0)
        assert (engine.finished_requests, engine.cancelled_requests) == (1, 3)  # 1: the warm-up
        assert started.server.servicer.inference.admission.active == 0


async def test_an_attempt_that_is_ended_early_counts() -> None:
    script = Script(BAD[:-2] + ', "b"' * 100 + "]}", GOOD)
    async with running(FakeEngine(script)) as started:
        both = (await started.stub.RunTask(checked_request(), timeout=60)).result
        once = (await started.stub.RunTask(checked_request(), timeout=60)).result
    assert (both.attempts, once.attempts) == (2, 1)
    assert both.usage.prompt_tokens == 2 * once.usage.prompt_tokens
    assert once.usage.output_tokens < both.usage.output_tokens < 3 * once.usage.output_tokens
    assert both.timings.total_seconds > both.timings.first_token_seconds > 0


async def test_a_truncated_answer_is_not_generated_again() -> None:
    script = Script(GOOD)
    async with running(FakeEngine(script)) as started:
        error = await failure(started.stub.RunTask(checked_request(max_tokens=1), timeout=60))
    assert error.reason == "OUTPUT_TRUNCATED"
    assert len(script.requests) == 1


async def test_a_truncated_second_attempt_is_reported_as_truncated() -> None:
    script = Script('{"tags": [1]}', GOOD + " " * 200)
    async with running(FakeEngine(script)) as started:
        error = await failure(started.stub.RunTask(checked_request(max_tokens=PIECES), timeout=60))
    assert error.reason == "OUTPUT_TRUNCATED"
    assert len(script.requests) == 2


async def test_a_stream_is_not_tried_again() -> None:
    script = Script(BAD, GOOD)
    async with running(FakeEngine(script), output_retries=3) as started:
        call = started.stub.StreamTask(streamed(checked_request()), timeout=60)
        events, error = await stream_failure(call)
    assert BAD.startswith("".join(event.delta for event in events))
    assert (error.reason, error.metadata["pointer"]) == ("OUTPUT_INVALID", "/tags")
    assert len(script.requests) == 1


@pytest.mark.slow  # attempts that a busy machine also ends in time
async def test_the_deadline_spans_all_attempts() -> None:
    """Each attempt alone would be in time."""
    for limit_s in (
        2.5,
        25,
    ):  # more time where a pause of the machine took that of the second attempt
        script = Script(BAD)
        engine = FakeEngine(script, token_delay_s=limit_s / 5 / PIECES)
        async with running(engine, inference_timeout_s=limit_s, output_retries=5) as started:
            error = await failure(started.stub.RunTask(checked_request(), timeout=60))
            assert error.reason == "INFERENCE_TIMEOUT"
            await until(lambda engine=engine: engine.active_requests == 0)
            assert started.server.servicer.inference.admission.active == 0
        if len(script.requests) >= 2:
            break
    assert 2 <= len(script.requests) <= 5
    assert engine.finished_requests >= 1


async def test_cancelled_during_the_second_attempt() -> None:
    engine = FakeEngine()

    def answer(request: GenerateRequest) -> str:
        script(request)
        if len(script.requests) == 2:
            engine.hang_after = 1
        return BAD

    script = Script(BAD)
    engine.answer = answer
    async with running(engine, output_retries=5) as started:
        call = started.stub.RunTask(checked_request(), timeout=60)
        await until(lambda: len(script.requests) == 2 and engine.active_requests == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: engine.active_requests == 0)
        assert engine.cancelled_requests == 2, "the first one ended at the violation"
        await until(lambda: started.server.servicer.inference.admission.active == 0)
        assert len(script.requests) == 2


# ValidateSchema


def question(**grammar: Any) -> pb.ValidateSchemaRequest:
    return pb.ValidateSchemaRequest(grammar=pb.Grammar(**grammar))


async def validated(**grammar: Any) -> pb.ValidateSchemaResponse:
    async with running() as started:
        return await started.stub.ValidateSchema(question(**grammar), timeout=60)


async def test_an_enforced_schema() -> None:
    found = await validated(json_schema=ENFORCED)
    assert found.enforcement == pb.ENFORCEMENT_ENFORCED
    known = {one.pointer: one for one in found.keywords}
    assert known["/title"].enforcement == pb.ENFORCEMENT_ANNOTATION
    minimum = known["/properties/x/minimum"]
    assert (minimum.keyword, minimum.enforcement) == ("minimum", pb.ENFORCEMENT_ENFORCED)
    assert not minimum.reason
    assert found.grammar_bytes > 0
    assert 0 < found.analysis_seconds < 60
    assert 0 < found.compile_seconds < 60


async def test_a_checked_schema() -> None:
    found = await validated(json_schema=CHECKED)
    assert found.enforcement == pb.ENFORCEMENT_CHECKED
    checked = [one for one in found.keywords if one.enforcement == pb.ENFORCEMENT_CHECKED]
    assert [(one.pointer, bool(one.reason)) for one in checked] == [(POINTER, True)]


@pytest.mark.parametrize("grammar", [{"regex": "a+"}, {"ebnf": 'root ::= "a"'}])
async def test_other_kinds_of_grammar(grammar: dict[str, str]) -> None:
    found = await validated(**grammar)
    assert found.enforcement == pb.ENFORCEMENT_ENFORCED
    assert not found.keywords


@dataclass(frozen=True)
class Unusable:
    """A grammar that is refused alike by RunTask and ValidateSchema. path: below the grammar."""

    name: str
    grammar: dict[str, Any]
    reason: str
    path: str


UNUSABLE = [
    Unusable("not JSON", {"json_schema": "{"}, "SCHEMA_NOT_JSON", "json_schema"),
    Unusable("invalid", {"json_schema": '{"type": 7}'}, "SCHEMA_INVALID", "json_schema"),
    Unusable("oversized", {"json_schema": f'"{"x" * 300_000}"'}, "SCHEMA_TOO_LARGE", "json_schema"),
    Unusable(
        "unsatisfiable",
        {"json_schema": '{"type": "integer", "minimum": 3, "maximum": 2}'},
        "SCHEMA_UNSATISFIABLE",
        "json_schema",
    ),
    Unusable(
        "remote",
        {"json_schema": '{"$ref": "https://example.org/a.json"}'},
        "SCHEMA_REMOTE_REF",
        "json_schema",
    ),
    Unusable("regex", {"regex": "("}, "GRAMMAR_INVALID", "regex"),
    Unusable("ebnf", {"ebnf": "nothing"}, "GRAMMAR_INVALID", "ebnf"),
    Unusable(
        "choice",
        {"choice": pb.Choice(options=["a", ""])},
        "GRAMMAR_INVALID",
        "choice.options[1]",
    ),
]


@pytest.mark.parametrize("case", UNUSABLE, ids=lambda case: case.name)
async def test_an_unusable_grammar_is_the_error_of_run_task(case: Unusable) -> None:
    async with running() as started:
        told = await failure(started.stub.ValidateSchema(question(**case.grammar), timeout=60))
        task = pb.Task(inline=pb.InlineTask(user="Go.", grammar=pb.Grammar(**case.grammar)))
        met = await failure(started.stub.RunTask(run_request(task), timeout=60))
    assert (told.code, told.reason) == (met.code, met.reason) == (INVALID, case.reason)
    ((field, text),) = told.field_violations
    assert field == f"grammar.{case.path}"
    assert met.field_violations == ((f"task.inline.{field}", text),)
    assert told.message == f"{field}: {text}"


async def test_validation_without_a_grammar_or_of_an_unsupported_kind_is_refused() -> None:
    async with running(FakeEngine(grammar_kinds=[GrammarKind.REGEX])) as started:
        empty = await failure(started.stub.ValidateSchema(question(), timeout=60))
        other = await failure(
            started.stub.ValidateSchema(question(ebnf='root ::= "a"'), timeout=60)
        )
    assert (empty.reason, list(empty.fields)) == ("INVALID_FIELD", ["grammar"])
    assert (other.reason, list(other.fields)) == ("GRAMMAR_KIND_UNSUPPORTED", ["grammar.ebnf"])


async def test_validation_needs_no_inference_slot() -> None:
    engine = FakeEngine()
    async with running(engine, max_concurrent=1, max_queue=0) as started:
        engine.hang_after = 0
        busy = started.stub.RunTask(run_request(), timeout=60)
        await until(lambda: engine.active_requests == 1)
        assert (
            await failure(started.stub.RunTask(run_request(), timeout=60))
        ).reason == "OVERLOADED"
        found = await started.stub.ValidateSchema(question(json_schema=ENFORCED), timeout=60)
        assert found.enforcement == pb.ENFORCEMENT_ENFORCED
        busy.cancel()


class Slow(FakeEngine):
    """Compiles for ever. Counts what is under way."""

    compiling = 0

    async def prepare(self, grammar: Grammar) -> None:
        self.compiling += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.compiling -= 1


@pytest.mark.slow  # a time limit in which all calls arrive, also on a busy machine
async def test_concurrent_validations_are_limited_and_time_out() -> None:
    engine = Slow()
    async with running(engine, max_queue=2, compile_timeout_s=2) as started:
        ask = [question(regex=f"a{{{index + 1}}}") for index in range(MAX_VALIDATIONS + 4)]
        answers = [failure(started.stub.ValidateSchema(one, timeout=60)) for one in ask]
        errors = [error.reason for error in await asyncio.gather(*answers)]
        assert engine.compiling == 0
        assert started.server.servicer.inference.validations.active == 0
    assert errors.count("OVERLOADED") == 2
    assert errors.count("GRAMMAR_COMPILE_TIMEOUT") == MAX_VALIDATIONS + 2


async def test_a_cancelled_validation_stops_its_compilation() -> None:
    engine = Slow()
    async with running(engine) as started:
        call = started.stub.ValidateSchema(question(regex="a+"), timeout=60)
        await until(lambda: engine.compiling == 1)
        call.cancel()
        await until(lambda: engine.compiling == 0)
        await until(lambda: started.server.servicer.inference.validations.active == 0)


class Endless:
    """An analyser that never answers. Counts the calls that wait for it."""

    def __init__(self) -> None:
        self.waiting = 0

    async def __call__(self, grammar: Grammar, limits: SchemaLimits, caller: str = "-") -> Analysed:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError("it never comes here")


@pytest.mark.parametrize("method", ["RunTask", "StreamTask", "ValidateSchema"])
async def test_an_analysis_ends_with_the_deadline_and_with_the_call(method: str) -> None:
    endless = Endless()
    async with running(analyser=endless, inference_timeout_s=0.1) as started:
        inference = started.server.servicer.inference
        if method == "RunTask":
            error = await failure(started.stub.RunTask(checked_request(), timeout=60))
        elif method == "StreamTask":
            call = started.stub.StreamTask(streamed(checked_request()), timeout=60)
            _, error = await stream_failure(call)
        else:
            error = await failure(started.stub.ValidateSchema(question(regex="a"), timeout=60))
        assert error.reason == "INFERENCE_TIMEOUT"
        assert endless.waiting == 0
        counts = (inference.admission, inference.analyses, inference.validations)
        assert [admission.active for admission in counts] == [0, 0, 0]


async def test_slow_grammars_occupy_no_inference_slot() -> None:
    endless = Endless()
    async with running(analyser=endless, max_concurrent=1, max_queue=2) as started:
        inference = started.server.servicer.inference
        calls = [started.stub.RunTask(checked_request(), timeout=60) for _ in range(3)]
        await until(lambda: endless.waiting == 3)
        assert inference.admission.active == 0
        await started.stub.RunTask(
            run_request(pb.Task(name=ANALYZE_TASK), [image_bytes()]), timeout=60
        )
        error = await failure(started.stub.RunTask(checked_request(), timeout=60))
        assert error.reason == "OVERLOADED"
        for call in calls:
            call.cancel()
        await until(lambda: endless.waiting == inference.analyses.active == 0)


async def test_validation_uses_the_analyser_of_the_server() -> None:
    """With the limits of the operator, once for each call; the engine gets what it gives."""
    asked: list[tuple[str, int]] = []
    ready = Grammar(GrammarKind.REGEX, "a+", ebnf='root ::= "a"+')

    async def analyser(grammar: Grammar, limits: SchemaLimits, caller: str = "-") -> Analysed:
        asked.append((grammar.source, limits.max_regex_length))
        return Analysed(ready, GrammarReport(Enforcement.CHECKED, why="is too large; shorten it"))

    script = Script("aaa")
    async with running(FakeEngine(script), analyser=analyser, max_regex_length=77) as started:
        request = run_request(inline(regex="a+"))
        result = (await started.stub.RunTask(request, timeout=60)).result
        found = await started.stub.ValidateSchema(question(regex="a+"), timeout=60)
        error = await failure(started.stub.RunTask(strictly(request), timeout=60))
    assert asked == [("a+", 77)] * 3
    assert [one.grammar for one in script.requests] == [ready]
    assert result.enforcement == found.enforcement == pb.ENFORCEMENT_CHECKED
    assert found.reason == "is too large; shorten it"
    assert (error.reason, error.field_violations) == (
        "SCHEMA_NOT_ENFORCED",
        (("task.inline.grammar.regex", "is too large; shorten it"),),
    )


# Warnings


def warned(message: Any) -> list[tuple[str, int]]:
    return [(one.pointer, one.kind) for one in message.warnings]


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_strict_refuses_misspelt_keywords(method: str) -> None:
    async with running() as started:
        request = strictly(run_request(inline(json_schema=MISSPELT)))
        if method == "RunTask":
            error = await failure(started.stub.RunTask(request, timeout=60))
        else:
            stream = pb.StreamTaskRequest(task=request.task, strict=True)
            _, error = await stream_failure(started.stub.StreamTask(stream, timeout=60))
    assert (error.code, error.reason) == (INVALID, "SCHEMA_NOT_ENFORCED")
    assert error.metadata["checked"] == "1"
    (violation,) = error.field_violations
    assert violation[0] == SCHEMA_FIELD
    assert violation[1] == (
        'at "/propertes": is not a keyword of JSON Schema and constrains nothing; properties is one'
    )


async def test_misspelt_keywords_are_reported_by_validation_and_answers() -> None:
    expected = [("/propertes", pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD)]
    async with running(FakeEngine("{}")) as started:
        asked = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=MISSPELT))
        told = await started.stub.ValidateSchema(asked, timeout=60)
        answer = await started.stub.RunTask(run_request(inline(json_schema=MISSPELT)), timeout=60)
    assert told.enforcement == pb.ENFORCEMENT_ENFORCED
    assert warned(told) == warned(answer.result) == expected


@pytest.mark.parametrize("schema", ["{}", "true", '{"title": "anything"}'])
async def test_a_schema_that_constrains_nothing_says_so(schema: str) -> None:
    async with running(FakeEngine("[1]")) as started:
        asked = pb.ValidateSchemaRequest(grammar=pb.Grammar(json_schema=schema))
        told = await started.stub.ValidateSchema(asked, timeout=60)
        answer = await started.stub.RunTask(run_request(inline(json_schema=schema)), timeout=60)
    expected = [("", pb.SCHEMA_WARNING_KIND_CONSTRAINS_NOTHING)]
    assert warned(told) == warned(answer.result) == expected


async def test_a_registered_task_reports_its_warnings(tmp_path: Path) -> None:
    task = {"name": "odd", "description": "d", "user": "u", "json_schema": json.loads(MISSPELT)}
    (tmp_path / "odd.json").write_text(json.dumps(task))
    async with running(tasks_dir=tmp_path) as started:
        found = await started.stub.GetTask(pb.GetTaskRequest(name="odd"), timeout=60)
    assert warned(found.task) == [("/propertes", pb.SCHEMA_WARNING_KIND_MISSPELT_KEYWORD)]


@pytest.mark.parametrize(
    ("grammar", "keywords"),
    [
        ({"json_schema": ENFORCED}, ["type", "additionalProperties", "required", "properties"]),
        ({"json_schema": "{}"}, []),
        ({"regex": "[a-z]{3}"}, []),
    ],
)
async def test_an_engine_that_enforces_no_grammars(
    grammar: dict[str, str], keywords: list[str]
) -> None:
    """All is checked, strict is refused, and what comes is validated."""
    why = "this engine does not enforce grammars"
    engine = FakeEngine(Script("no", "no"), enforcer=Enforcer.VALIDATION)
    async with running(engine) as started:
        model = await started.stub.GetModel(pb.GetModelRequest(), timeout=60)
        assert model.capabilities.enforcer == pb.ENFORCER_VALIDATION
        request = pb.ValidateSchemaRequest(grammar=pb.Grammar(**grammar))
        told = await started.stub.ValidateSchema(request, timeout=60)
        assert told.enforcement == pb.ENFORCEMENT_CHECKED
        kept = [one for one in told.keywords if one.enforcement != pb.ENFORCEMENT_ANNOTATION]
        assert {one.keyword for one in kept} >= set(keywords)
        assert all((one.enforcement, one.reason) == (pb.ENFORCEMENT_CHECKED, why) for one in kept)
        assert told.reason == ("" if kept else why)
        error = await failure(
            started.stub.RunTask(strictly(run_request(inline(**grammar))), timeout=60)
        )
        assert error.reason == "SCHEMA_NOT_ENFORCED"
        assert why in error.message
        error = await failure(started.stub.RunTask(run_request(inline(**grammar)), timeout=60))
        assert error.reason == "OUTPUT_INVALID"
        engine.answer = {"json_schema": '{"x": 3}', "regex": "abc"}[next(iter(grammar))]
        answer = await started.stub.RunTask(run_request(inline(**grammar)), timeout=60)
        assert answer.result.enforcement == pb.ENFORCEMENT_CHECKED


async def test_a_registered_task_on_an_engine_that_enforces_no_grammars() -> None:
    async with running(FakeEngine(enforcer=Enforcer.VALIDATION)) as started:
        found = await started.stub.GetTask(pb.GetTaskRequest(name=ANALYZE_TASK), timeout=60)
        listed = await started.stub.ListTasks(pb.ListTasksRequest(), timeout=60)
        for task in (found.task, *listed.tasks):
            assert task.enforcement == pb.ENFORCEMENT_CHECKED
        strict = strictly(run_request(pb.Task(name=ANALYZE_TASK), [image_bytes()]))
        error = await failure(started.stub.RunTask(strict, timeout=60))
        assert error.reason == "SCHEMA_NOT_ENFORCED"


async def test_a_registered_task_on_an_engine_that_does_not_limit_lengths(tmp_path: Path) -> None:
    """A list of tasks says what the answers say: a long string is only checked there."""
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string", "maxLength": 500}},
        "required": ["s"],
        "additionalProperties": False,
    }
    task = {"name": "long", "description": "d", "user": "u", "json_schema": schema}
    (tmp_path / "long.json").write_text(json.dumps(task))
    async with running(FakeEngine('{"s": "x"}'), tasks_dir=tmp_path) as started:
        found = await started.stub.GetTask(pb.GetTaskRequest(name="long"), timeout=60)
        answer = await started.stub.RunTask(run_request(pb.Task(name="long")), timeout=60)
    assert found.task.enforcement == answer.result.enforcement == pb.ENFORCEMENT_CHECKED
