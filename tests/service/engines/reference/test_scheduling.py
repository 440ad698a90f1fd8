"""When requests join, wait and leave, watched at the decoder itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from service.engines.reference import ReferenceEngine
from service.engines.reference.sequence import Sequence
from service.errors import EngineUnavailable, InternalError
from service.types import FinishReason, GenerateRequest
from tests.checkpoints import Shape
from tests.service.engines.conformance import (
    GRAMMARS,
    LONG,
    answer,
    collect,
    first_chunk,
    generate,
    random_image,
    request,
    until,
)

Write = Callable[[Shape], Path]


class Watched:
    """An engine whose decode steps can be counted, slowed down and made to fail."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.engine = ReferenceEngine(folder, threads=1, **options)
        self.steps: list[list[Sequence]] = []
        self.pieces: list[Sequence] = []
        self.failures = 0

    async def start(self) -> None:
        await self.engine.start()
        assert self.engine._model is not None
        runner = self.engine._model.runner
        decode, prefill = runner.decode, runner.prefill

        def watched_decode(sequences: list[Sequence]) -> list[object]:
            self.steps.append(list(sequences))
            if self.failures:
                self.failures -= 1
                raise RuntimeError("no such kernel")
            return list(decode(sequences))

        def watched_prefill(sequence: Sequence) -> object:
            self.pieces.append(sequence)
            return prefill(sequence)

        runner.decode = watched_decode  # type: ignore[method-assign, assignment]
        runner.prefill = watched_prefill  # type: ignore[method-assign, assignment]


@pytest.fixture
async def watched(checkpoint: Write) -> AsyncIterator[Watched]:
    watched = Watched(checkpoint(Shape()), max_batch=4, prefill_piece=16)
    await watched.start()
    yield watched
    await watched.engine.close()


def long(words: int = 1) -> GenerateRequest:
    return request("word " * words, constraint=LONG, max_tokens=400)


async def test_a_closed_request_is_gone_after_one_step(watched: Watched) -> None:
    engine = watched.engine
    other = await first_chunk(engine, long())
    for _ in range(10):
        chunks = await first_chunk(engine, long())
        sequence = watched.steps[-1][-1] if len(watched.steps[-1]) > 1 else None
        await chunks.aclose()
        seen = len(watched.steps)
        await until(lambda: engine.active_requests == 1)
        late = [step for step in watched.steps[seen:] if sequence is not None and sequence in step]
        assert len(late) <= 1
    await other.aclose()
    await until(lambda: engine.reserved_rows == 0)
    seen = len(watched.steps)
    await asyncio.sleep(0.05)
    assert len(watched.steps) == seen, "an idle engine computes nothing"


async def test_a_request_joins_while_another_answers(watched: Watched) -> None:
    engine = watched.engine
    slow = await first_chunk(engine, long())
    _, reason, _ = await answer(engine, request("Short.", constraint=GRAMMARS[7]))
    assert reason is FinishReason.STOP
    assert any(len(step) == 2 for step in watched.steps)
    await slow.aclose()


async def test_a_long_prompt_takes_turns_with_answers(watched: Watched) -> None:
    engine = watched.engine
    slow = await first_chunk(engine, long())
    watched.pieces.clear()
    seen = len(watched.steps)
    await collect(engine, request("a long prompt " * 40, max_tokens=1))
    assert len(watched.pieces) > 10
    assert len(watched.steps) - seen >= len(watched.pieces) - 2, "a step between two pieces"
    await slow.aclose()


async def test_no_more_than_max_batch_run_together(watched: Watched) -> None:
    await asyncio.gather(
        *(collect(watched.engine, request(f"{n}", constraint=GRAMMARS[0])) for n in range(12))
    )
    assert max(len(step) for step in watched.steps) == 4


async def test_a_failed_step_ends_its_requests_and_not_the_engine(watched: Watched) -> None:
    engine = watched.engine
    watched.failures = 1
    with pytest.raises(EngineUnavailable):
        await collect(engine, long())
    await engine.check_health()
    assert engine.active_requests == engine.reserved_rows == 0
    _, reason, _ = await answer(engine, request(constraint=GRAMMARS[7]))
    assert reason is FinishReason.STOP


async def test_repeated_failures_count_as_a_dead_engine(watched: Watched) -> None:
    engine = watched.engine
    watched.failures = 3
    for _ in range(3):
        with pytest.raises(EngineUnavailable):
            await collect(engine, long())
    with pytest.raises(EngineUnavailable) as raised:
        await engine.check_health()
    assert raised.value.reason == "ENGINE_DEAD"


async def test_the_failure_of_one_request_does_not_affect_others(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = watched.engine
    extend = Sequence.extend

    def failing(sequence: Sequence, logits: object) -> None:
        if sequence.max_tokens == 13:
            raise RuntimeError("only this one")
        extend(sequence, logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Sequence, "extend", failing)
    slow = await first_chunk(engine, long())
    with pytest.raises(InternalError) as raised:
        await collect(engine, request("Fails.", random_image(1), max_tokens=13))
    assert raised.value.message == "internal error"
    await anext(slow)
    await slow.aclose()
    await until(lambda: engine.active_requests == 0)


async def test_an_engine_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    engine = ReferenceEngine(tmp_path / "nothing")
    with pytest.raises(EngineUnavailable, match="no model folder 'nothing'"):
        await engine.start()
    with pytest.raises(EngineUnavailable):
        await collect(engine, request())
    await engine.close()


async def test_closing_while_loading(checkpoint: Write) -> None:
    engine = ReferenceEngine(checkpoint(Shape()), threads=1)
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineUnavailable):
        await starting
    with pytest.raises(EngineUnavailable):
        await anext(generate(engine, request()))
