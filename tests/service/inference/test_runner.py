"""The run order, the timeout and cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest

from service.errors import (
    EngineUnavailable,
    GrammarError,
    InferenceTimeout,
    InternalError,
    InvalidRequest,
    NoUsableFields,
    OutputInvalid,
    OutputTruncated,
    TooManyImages,
    VisionDisabled,
)
from service.inference import runner
from service.inference.calls import Answer
from service.inference.runner import run, seed_of, stream
from service.inference.sampling import OPTIONS
from service.schema_compiler.report import Enforcement, GrammarReport, KeywordReport
from service.tasks.contract import Task
from service.tasks.image_analysis import FIELDS, IMAGE_ANALYSIS, STRING_FIELDS
from service.types import (
    Chunk,
    Enforcer,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    Sampling,
    Usage,
)
from tests.service.harness import until
from tests.service.tasks.engines import TIMINGS, USAGE, ScriptedEngine, capabilities

IMAGE = Image(np.zeros((2, 2, 3), np.uint8))
PLAIN = Task("plain", "Any text.", user="Say it.")
EMPTY = json.dumps({name: "" if name in STRING_FIELDS else [] for name in FIELDS})


def task(kind: GrammarKind, source: str, **more: Any) -> Task:
    return Task("t", "A task.", user="Do it.", grammar=Grammar(kind, source), **more)


INTEGER = task(GrammarKind.JSON_SCHEMA, '{"type": "integer", "minimum": 3}')


async def go(
    engine: ScriptedEngine,
    what: Task = PLAIN,
    images: int = 0,
    sampling: Sampling = Sampling(),
    timeout_s: float = 5.0,
    **more: Any,
) -> Answer:
    return await run(
        engine, what, [IMAGE] * images, sampling, timeout_s=timeout_s, request_id="r", **more
    )


async def refused(error: type[Exception], engine: ScriptedEngine, *args: Any, **more: Any) -> Any:
    with pytest.raises(error) as caught:
        await go(engine, *args, **more)
    assert type(caught.value) is error
    return caught.value


async def test_an_answer() -> None:
    engine = ScriptedEngine(["4", "2"])
    result = await go(engine, INTEGER)
    assert (result.text, result.value, result.json) == ("42", 42, "42")
    assert (result.usage, result.timings) == (USAGE, TIMINGS)
    assert result.finish_reason is FinishReason.STOP
    assert engine.log == ["prepare", "generate", "closed"]


async def test_the_engine_gets_the_prompt_and_grammar_of_the_task() -> None:
    engine = ScriptedEngine(["x"])
    what = replace(PLAIN, system="Be brief.")
    await go(engine, what, images=2, sampling=Sampling(max_tokens=5))
    (request,) = engine.requests
    assert (request.system, request.user, request.request_id) == ("Be brief.", "Say it.", "r")
    assert request.images == (IMAGE, IMAGE)
    assert request.sampling.max_tokens == 5
    assert engine.log == ["generate", "closed"], "no grammar, nothing to prepare"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.5),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
async def test_options_out_of_range(option: str, value: Any) -> None:
    engine = ScriptedEngine()
    error = await refused(InvalidRequest, engine, sampling=Sampling(**{option: value}))
    assert [v.field for v in error.violations] == [f"sampling.{option}"]
    assert error.violations[0].description.endswith(f", not {value}")
    assert engine.log == []


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, top_p=0.8, top_k=20),
        Sampling(temperature=2, top_p=1, repetition_penalty=10, seed=2**64 - 1, max_tokens=1),
    ],
)
async def test_options_within_range(sampling: Sampling) -> None:
    await go(ScriptedEngine(["x"]), sampling=sampling)


def test_every_option_has_a_range() -> None:
    numbers = {one.name for one in fields(Sampling)} - {"thinking"}
    assert {one.name for one in OPTIONS} == numbers


async def test_all_wrong_options_are_named_at_once() -> None:
    wrong = Sampling(temperature=-1, top_p=0, seed=-1)
    error = await refused(InvalidRequest, ScriptedEngine(), sampling=wrong)
    assert [v.field for v in error.violations] == [
        "sampling.temperature",
        "sampling.top_p",
        "sampling.seed",
    ]


async def test_an_option_that_the_engine_ignores_is_refused_when_it_is_set() -> None:
    caps = capabilities(options=frozenset({"max_tokens", "temperature"}))
    engine = ScriptedEngine(["x"], capabilities=caps)
    await go(engine, sampling=Sampling(temperature=1))
    error = await refused(InvalidRequest, engine, sampling=Sampling(repetition_penalty=1.1))
    assert error.violations[0].field == "sampling.repetition_penalty"
    assert "max_tokens, temperature" in error.message


async def test_a_task_that_needs_an_image() -> None:
    error = await refused(InvalidRequest, ScriptedEngine(), IMAGE_ANALYSIS)
    assert error.reason == "IMAGE_REQUIRED"
    assert error.violations[0].field == "images"


async def test_images_without_vision() -> None:
    engine = ScriptedEngine(["x"], capabilities=capabilities(vision=False))
    await refused(VisionDisabled, engine, images=1)
    assert (await go(engine)).text == "x"


@pytest.mark.parametrize(("of_task", "limit"), [(None, 2), (1, 1), (5, 2)])
async def test_too_many_images(of_task: int | None, limit: int) -> None:
    engine = ScriptedEngine(["x"], capabilities=capabilities(max_images=2))
    what = replace(PLAIN, max_images=of_task)
    await go(engine, what, images=limit)
    error = await refused(TooManyImages, engine, what, images=limit + 1)
    assert error.reason == "TOO_MANY_IMAGES"
    assert error.metadata == {"limit": str(limit), "actual": str(limit + 1)}


async def test_a_kind_of_grammar_that_the_engine_lacks() -> None:
    kinds = frozenset({GrammarKind.REGEX, GrammarKind.JSON_SCHEMA})
    engine = ScriptedEngine(capabilities=capabilities(kinds=kinds))
    error = await refused(GrammarError, engine, task(GrammarKind.EBNF, 'root ::= "a"'))
    assert error.metadata == {"kind": "ebnf", "supported": "json_schema, regex"}
    assert engine.log == []


async def test_the_order_of_the_checks() -> None:
    caps = capabilities(vision=False, kinds=frozenset(), max_images=0)
    engine = ScriptedEngine(["x"], finish=FinishReason.LENGTH, capabilities=caps)
    bad = Sampling(top_p=2)
    assert "sampling" in (await refused(InvalidRequest, engine, IMAGE_ANALYSIS, 1, bad)).message
    await refused(VisionDisabled, engine, IMAGE_ANALYSIS, 1)
    engine.capabilities = capabilities(kinds=frozenset())
    await refused(GrammarError, engine, IMAGE_ANALYSIS, 1)
    engine.capabilities = capabilities()
    await refused(OutputTruncated, engine, IMAGE_ANALYSIS, 1)


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.LOOP])
async def test_a_cut_answer_never_reaches_the_parser(finish: FinishReason) -> None:
    what = replace(INTEGER, parse=lambda text: pytest.fail("parsed"))
    error = await refused(OutputTruncated, ScriptedEngine(["42"], finish=finish), what)
    assert error.metadata == {
        "finish_reason": finish.value,
        "output_tokens": "3",
        "max_tokens": "1024",
        "prompt_tokens": "7",
        "image_tokens": "4",
    }


@pytest.mark.parametrize("pieces", [[], [""], [" \n", "\t"]])
async def test_a_blank_answer_is_an_error(pieces: list[str]) -> None:
    error = await refused(OutputInvalid, ScriptedEngine(pieces))
    assert error.metadata["keyword"] == "empty"


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar(GrammarKind.REGEX, " *"), "  "),
        (Grammar(GrammarKind.REGEX, " *"), ""),
        (Grammar(GrammarKind.EBNF, 'root ::= "\\n"'), "\n"),
    ],
)
async def test_a_blank_answer_that_the_grammar_allows_is_valid(grammar: Grammar, text: str) -> None:
    result = await go(ScriptedEngine([text]), replace(INTEGER, grammar=grammar))
    assert (result.text, result.json) == (text, None)


async def test_a_blank_answer_is_not_json() -> None:
    error = await refused(OutputInvalid, ScriptedEngine([" "]), INTEGER)
    assert error.metadata["keyword"] == "json"


async def test_an_engine_that_ends_without_a_reason() -> None:
    await refused(InternalError, ScriptedEngine(["x"], finish=None))


async def test_the_answer_is_validated_against_the_schema() -> None:
    error = await refused(OutputInvalid, ScriptedEngine(["2"]), INTEGER)
    assert error.metadata == {"pointer": "", "keyword": "minimum", "attempts": "1"}


CHECKED = GrammarReport(
    Enforcement.CHECKED, (KeywordReport("/minimum", "minimum", Enforcement.CHECKED, "is hard"),)
)
RANDOM = Sampling(temperature=1.0, seed=2**64 - 1)


@dataclass
class Improving(ScriptedEngine):
    """Says another piece at each attempt."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        every = self.pieces
        self.pieces = every[len(self.requests) :][:1]
        try:
            async for chunk in super().generate(request):
                yield chunk
        finally:
            self.pieces = every


async def test_usage_and_timings_include_all_attempts() -> None:
    engine = Improving(["1", "2", "3"])
    what = replace(INTEGER, report=CHECKED)
    result = await go(engine, what, sampling=RANDOM, retries=2)
    assert (result.text, result.attempts) == ("3", 3)
    assert result.usage == Usage(prompt_tokens=21, image_tokens=12, output_tokens=9)
    times = (result.timings.queue_s, result.timings.first_token_s, result.timings.total_s)
    assert times == pytest.approx((0.3, 0.3 + 0.3 + 0.2, 0.9))
    assert engine.log == ["prepare", *["generate", "closed"] * 3]
    assert {(r.user, r.grammar, replace(r.sampling, seed=0)) for r in engine.requests} == {
        ("Do it.", what.grammar, replace(RANDOM, seed=0))
    }
    assert [r.sampling.seed for r in engine.requests] == [seed_of(RANDOM.seed, i) for i in range(3)]


async def test_seeds_of_further_attempts_are_uint64() -> None:
    found = [seed_of(2**64 - 1, attempt) for attempt in range(6)]
    assert found[0] == 2**64 - 1
    assert len(set(found)) == 6
    assert all(seed is not None and 0 <= seed < 2**64 for seed in found)
    assert found[1] != seed_of(0, 1)
    assert seed_of(None, 3) is None


@pytest.mark.parametrize(
    ("report", "temperature"),
    [(GrammarReport(Enforcement.ENFORCED), 1.0), (None, 1.0)],
    ids=["enforced", "no report"],
)
async def test_no_further_attempt_if_the_answer_would_be_the_same(
    report: GrammarReport | None, temperature: float
) -> None:
    engine = Improving(["2", "3"])
    what = replace(INTEGER, report=report)
    sampling = Sampling(temperature=temperature)
    error = await refused(OutputInvalid, engine, what, sampling=sampling, retries=5)
    assert error.metadata["attempts"] == "1"
    assert engine.log == ["prepare", "generate", "closed"]


async def test_where_the_engine_enforces_no_grammar_an_enforced_schema_is_tried_again() -> None:
    """And the answer never claims that its grammar was enforced."""
    can = replace(capabilities(), enforcer=Enforcer.VALIDATION)
    what = replace(INTEGER, report=GrammarReport(Enforcement.ENFORCED))
    engine = Improving(["2", "3"], capabilities=can)
    result = await go(engine, what, sampling=RANDOM, retries=1)
    assert (result.text, result.attempts) == ("3", 2)
    assert result.report is not None
    assert result.report.enforcement is Enforcement.CHECKED
    *_, streamed = [event async for event in events(ScriptedEngine(["3"], capabilities=can), what)]
    assert isinstance(streamed, Answer)
    assert streamed.report == result.report
    masked = await go(ScriptedEngine(["3"]), what)
    assert masked.report == what.report


@pytest.mark.parametrize("limit_s", [60.0, 0.0], ids=["in time", "too much for the event loop"])
async def test_a_short_answer_under_a_known_schema_needs_no_thread(
    limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "INLINE_S", limit_s)
    await go(ScriptedEngine(["3"]), INTEGER)
    threads = []

    async def to_thread(function: Any, *args: Any) -> Any:
        threads.append(function)
        return function(*args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    what = replace(INTEGER, report=CHECKED)
    assert (await go(ScriptedEngine(["4"]), what)).value == 4
    await refused(OutputInvalid, ScriptedEngine(["2"]), what)
    await go(ScriptedEngine(["7" * (runner.INLINE_CHARACTERS // 2)]), what)
    inline = len(threads) == 0
    assert inline is (limit_s > 0)
    await refused(OutputInvalid, ScriptedEngine([" " * runner.INLINE_CHARACTERS + "2"]), what)
    assert len(threads) > 0, "a long answer is validated in a thread"


async def test_an_empty_analysis_is_not_generated_again() -> None:
    what = replace(INTEGER, report=CHECKED, usable=lambda value: False)
    engine = Improving(["3", "4"])
    await refused(NoUsableFields, engine, what, sampling=RANDOM, retries=5)
    assert len(engine.requests) == 1


async def test_answers_of_tasks_with_a_parser_are_validated() -> None:
    what = replace(INTEGER, parse=lambda text: "whatever")
    await refused(OutputInvalid, ScriptedEngine(["2"]), what)
    assert (await go(ScriptedEngine(["3"]), what)).value == "whatever"


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        (GrammarKind.REGEX, "[a-z]+", "abc", "abc1"),
        (GrammarKind.REGEX, "a|b", "b", "ab"),
        (GrammarKind.CHOICE, '["yes", "no"]', "yes", "yes "),
    ],
)
async def test_regex_and_choice_answers_are_validated(
    kind: GrammarKind, source: str, good: str, bad: str
) -> None:
    result = await go(ScriptedEngine([good]), task(kind, source))
    assert (result.value, result.json) == (good, None)
    error = await refused(OutputInvalid, ScriptedEngine([bad]), task(kind, source))
    assert error.metadata["keyword"] == kind.value
    assert bad not in error.message


async def test_image_analysis_through_the_runner() -> None:
    answer = json.dumps({**json.loads(EMPTY), "subjects": "a cat", "tags": "x, y"})
    result = await go(ScriptedEngine([answer]), IMAGE_ANALYSIS, images=1)
    assert result.text == answer
    assert result.value.tags == ("x", "y")
    assert result.json is not None
    assert json.loads(result.json)["subjects"] == ["a cat"]


async def test_accept_empty() -> None:
    engine = ScriptedEngine([EMPTY])
    await refused(NoUsableFields, engine, IMAGE_ANALYSIS, 1)
    result = await go(engine, IMAGE_ANALYSIS, 1, accept_empty=True)
    assert result.value.description == ""


@pytest.mark.parametrize("slow", [{"prepare_s": 9}, {"piece_s": 9}])
async def test_the_timeout_covers_preparing_and_generating(slow: dict[str, float]) -> None:
    engine = ScriptedEngine(["1"], **slow)  # type: ignore[arg-type]
    error = await refused(InferenceTimeout, engine, INTEGER, timeout_s=0.05)
    assert error.metadata == {"timeout_s": "0.05"}
    assert engine.log.count("generate") == engine.log.count("closed")


async def test_a_timeout_error_of_the_engine_is_not_an_inference_timeout() -> None:
    engine = ScriptedEngine(["1"], error=asyncio.TimeoutError())
    with pytest.raises(asyncio.TimeoutError):
        await go(engine, INTEGER)


async def test_errors_of_the_engine_pass_and_close_it() -> None:
    engine = ScriptedEngine(["1"], error=EngineUnavailable("gone"))
    await refused(EngineUnavailable, engine, INTEGER)
    assert engine.log[-1] == "closed"


async def test_cancellation_passes_and_closes_the_engine() -> None:
    engine = ScriptedEngine(["1"], piece_s=9)
    running = asyncio.create_task(go(engine, INTEGER))
    await until(lambda: "generate" in engine.log)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.log == ["prepare", "generate", "closed"]


def events(engine: ScriptedEngine, what: Task = PLAIN, timeout_s: float = 5.0) -> Any:
    return stream(engine, what, [], Sampling(), timeout_s=timeout_s, request_id="r")


async def test_a_stream_gives_pieces_then_the_result() -> None:
    engine = ScriptedEngine(["4", "", "2"])
    *pieces, result = [event async for event in events(engine, INTEGER)]
    assert pieces == ["4", "2"]
    assert isinstance(result, Answer)
    assert result.value == 42
    assert engine.log == ["prepare", "generate", "closed"]


async def test_a_stream_has_the_same_errors() -> None:
    for engine, error in (
        (ScriptedEngine(["2"]), OutputInvalid),
        (ScriptedEngine(["4"], finish=FinishReason.LENGTH), OutputTruncated),
        (ScriptedEngine(["4"], error=EngineUnavailable("gone")), EngineUnavailable),
    ):
        seen: list[Any] = []

        async def follow(engine: ScriptedEngine, seen: list[Any]) -> None:
            async for event in events(engine, INTEGER):
                seen.append(event)

        with pytest.raises(error):
            await follow(engine, seen)
        assert seen == list(engine.pieces)
        assert engine.log[-1] == "closed"


async def test_a_stream_checks_before_the_engine_works() -> None:
    engine = ScriptedEngine(capabilities=capabilities(kinds=frozenset()))
    with pytest.raises(GrammarError):
        await anext(events(engine, INTEGER))
    assert engine.log == []


async def test_a_stream_times_out() -> None:
    for timeout_s in (0.1, 1, 10):  # a busy machine may not begin in time
        engine = ScriptedEngine(["1"] * 1000, piece_s=0.02)
        with pytest.raises(InferenceTimeout):
            _ = [event async for event in events(engine, timeout_s=timeout_s)]
        if engine.log:
            break
    assert engine.log[-1] == "closed"


async def test_closing_a_stream_closes_the_engine() -> None:
    engine = ScriptedEngine(["1", "2"])
    open_events = events(engine)
    assert await anext(open_events) == "1"
    await open_events.aclose()
    assert engine.log == ["generate", "closed"]


async def test_cancelling_a_stream_closes_the_engine() -> None:
    engine = ScriptedEngine(["1"], piece_s=9)

    async def consume() -> None:
        async for _ in events(engine):
            pass

    running = asyncio.create_task(consume())
    await until(lambda: "generate" in engine.log)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert engine.log == ["generate", "closed"]
