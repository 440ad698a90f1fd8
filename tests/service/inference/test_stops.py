from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.fake import FakeEngine
from service.errors import InvalidRequest, OutputTruncated
from service.inference.calls import Answer
from service.inference.runner import run, stream
from service.inference.stops import StopFilter, until_stop
from service.tasks.contract import Task
from service.types import Chunk, FinishReason, Grammar, GrammarKind, Sampling, Usage

TASK = Task("t", "", "Describe.")
JSON = Task("t", "", "Describe.", grammar=Grammar(GrammarKind.JSON_SCHEMA, "{}", "root ::= [a]"))


def expected(text: str, stops: list[str]) -> str:
    """The oracle: character by character, as an engine that looks after each of them."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


PIECES = st.lists(st.text("ab\n é", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab\n é", min_size=1, max_size=4), min_size=1, max_size=4)


@given(PIECES, STOPS)
def test_the_cut_does_not_depend_on_the_chunks(pieces: list[str], stops: list[str]) -> None:
    kept = StopFilter(stops)
    given_out = ""
    for piece in pieces:
        given_out += kept.feed(piece)
        if kept.found:
            break
    if not kept.found:
        given_out += kept.end()
    assert given_out == expected("".join(pieces), stops)


async def chunks(*texts: str) -> AsyncIterator[Chunk]:
    for number, text in enumerate(texts, start=1):
        last = FinishReason.LENGTH if number == len(texts) else None
        yield Chunk(text, last, Usage(7, 2, number))


async def test_no_part_of_a_stop_text_is_sent() -> None:
    found = [one async for one in until_stop(chunks("a ST", "O", "P b", " c"), ["STOP"])]
    assert "".join(one.text for one in found) == "a "
    assert found[-1].finish_reason is FinishReason.STOP_TEXT
    assert found[-1].usage == Usage(7, 2, 3)


async def test_held_back_text_is_sent_if_no_stop_text_follows() -> None:
    found = [one async for one in until_stop(chunks("a", " ST", "O"), ["STOP"])]
    assert "".join(one.text for one in found) == "a STO"
    assert found[-1].finish_reason is FinishReason.LENGTH


async def started(engine: FakeEngine) -> FakeEngine:
    await engine.start()
    return engine


async def asked(engine: FakeEngine, task: Task = TASK, **options: Any) -> Answer:
    sampling = options.pop("sampling", Sampling())
    return await run(engine, task, [], sampling, timeout_s=10, request_id="r", **options)


async def test_the_engine_is_cancelled_at_the_stop_text() -> None:
    engine = await started(FakeEngine("one two three four five"))
    answer = await asked(engine, stop=["three"])
    assert (answer.text, answer.finish_reason) == ("one two ", FinishReason.STOP_TEXT)
    assert (engine.cancelled_requests, engine.active_requests) == (1, 0)
    assert 0 < answer.usage.output_tokens < 5
    assert answer.usage.prompt_tokens > 0


async def test_streams_end_before_the_stop_text() -> None:
    engine = await started(FakeEngine("one two three four five"))
    events = [
        event
        async for event in stream(
            engine, TASK, [], Sampling(), timeout_s=10, request_id="r", stop=["wo th"]
        )
    ]
    *pieces, answer = events
    assert "".join(str(piece) for piece in pieces) == "one t"
    assert isinstance(answer, Answer)
    assert answer.text == "one t"


async def test_an_answer_may_be_empty_before_a_stop_text() -> None:
    engine = await started(FakeEngine("one two"))
    assert (await asked(engine, stop=["one"])).text == ""


@pytest.mark.parametrize("task", [JSON, Task("t", "", "Describe.", parse=str)])
async def test_stop_texts_are_refused_where_they_would_cut_a_structure(task: Task) -> None:
    engine = await started(FakeEngine("{}"))
    with pytest.raises(InvalidRequest, match="stop"):
        await asked(engine, task, stop=["}"])


@pytest.mark.parametrize("stops", [[""], ["a", ""], ["x" * 257], ["a"] * 17])
async def test_stop_texts_that_cannot_be_used(stops: list[str]) -> None:
    engine = await started(FakeEngine("text"))
    with pytest.raises(InvalidRequest, match="stop"):
        await asked(engine, stop=stops)


async def test_truncated_text_is_an_answer_only_with_accept_cut() -> None:
    engine = await started(FakeEngine("one two three"))
    short = Sampling(max_tokens=2)
    answer = await asked(engine, sampling=short, accept_cut=True)
    assert (answer.text, answer.finish_reason) == ("one two", FinishReason.LENGTH)
    with pytest.raises(OutputTruncated):
        await asked(engine, sampling=short)


@pytest.mark.parametrize("task", [JSON, Task("t", "", "Describe.", parse=str)])
async def test_truncated_json_is_an_error_even_with_accept_cut(task: Task) -> None:
    engine = await started(FakeEngine('{"a": "b c d e f g h"}'))
    with pytest.raises(OutputTruncated):
        await asked(engine, task, sampling=Sampling(max_tokens=2), accept_cut=True)
