"""Text that is kept back for a short time, as replicas on Ray ask for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from service.engine import CollectsText
from service.engines.reference import ReferenceEngine
from service.errors import EngineUnavailable
from service.inference.calls import Answer
from service.inference.runner import run, stream
from service.tasks.contract import Task
from service.types import Chunk, FinishReason, Sampling, Usage
from tests.checkpoints import Shape
from tests.service.engines.conformance import LONG, request, until

NEVER = 3600.0
LIMIT_S = 60.0
WANTED = request("word", constraint=LONG, max_tokens=40)
Write = Callable[[Shape], Path]


@asynccontextmanager
async def running(folder: Path, delay_s: float) -> AsyncIterator[ReferenceEngine]:
    engine = ReferenceEngine(folder, threads=1)
    assert isinstance(engine, CollectsText)
    engine.collect_text(delay_s)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@dataclass
class Stopped:
    """Whether the decoder waits, and may go on."""

    stopped: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stopped_after(engine: ReferenceEngine, steps: int) -> Iterator[Stopped]:
    """The decoder waits after so many steps."""
    assert engine._model is not None
    runner, decoder, done = engine._model.runner, Stopped(), 0
    decode = runner.decode

    def counted(sequences: Any) -> Any:
        nonlocal done
        if done == steps:
            decoder.stopped.set()
            decoder.go_on.wait(LIMIT_S)
        done += 1
        return decode(sequences)

    runner.decode = counted  # type: ignore[method-assign]
    try:
        yield decoder
    finally:
        decoder.go_on.set()


def text_and_usage(chunks: list[Chunk]) -> list[tuple[str, Usage]]:
    """The text up to and including each chunk, and the usage with it."""
    return [
        ("".join(one.text for one in chunks[: place + 1]), chunk.usage)
        for place, chunk in enumerate(chunks)
    ]


@pytest.mark.parametrize("piecewise", [True, False])
async def test_text_comes_with_the_end(checkpoint: Write, piecewise: bool) -> None:
    wanted = replace(WANTED, piecewise=piecewise)
    async with running(checkpoint(Shape()), 0.0) as engine:
        plain = [chunk async for chunk in engine.generate(wanted)]
    async with running(checkpoint(Shape()), NEVER) as engine:
        with stopped_after(engine, 3) as decoder:
            chunks, collected = engine.generate(wanted), []
            if piecewise:
                collected.append(await asyncio.wait_for(anext(chunks), LIMIT_S))
            decoder.go_on.set()
            collected += [chunk async for chunk in chunks]
    assert len(plain) > 10
    assert len(collected) == 1 + piecewise, "only the first text comes before the end"
    assert "".join(c.text for c in collected) == "".join(c.text for c in plain)
    assert (collected[-1].usage, collected[-1].finish_reason) == (
        plain[-1].usage,
        plain[-1].finish_reason,
    )
    if piecewise:
        assert (collected[0].text, collected[0].usage) in text_and_usage(plain)


@pytest.mark.slow
async def test_tokens_are_counted_up_to_a_stop_text(checkpoint: Write) -> None:
    """However much text comes together: the same request has the same usage."""
    task, sampling = Task("t", "", "word"), Sampling(max_tokens=40)
    found: list[tuple[str, Usage]] = []
    stop = ""
    for delay_s in (0.0, NEVER):
        async with running(checkpoint(Shape()), delay_s) as engine:
            options: Any = {"timeout_s": LIMIT_S, "request_id": "r", "accept_cut": True}
            if not stop:
                whole = await run(engine, task, [], sampling, **options)
                stop = whole.text[30:34]
            answer = await run(engine, task, [], sampling, **options, stop=[stop])
            found.append((answer.text, answer.usage))
            streamed = stream(engine, task, [], sampling, **options, stop=[stop])
            last = [event async for event in streamed][-1]
            assert isinstance(last, Answer)
            found.append((last.text, last.usage))
    assert found == [found[0]] * 4
    assert 0 < found[0][1].output_tokens < whole.usage.output_tokens - 10


async def test_text_is_kept_for_the_delay_alone(checkpoint: Write) -> None:
    async with running(checkpoint(Shape()), 0.01) as engine:
        with stopped_after(engine, 3):
            async with aclosing(engine.generate(WANTED)) as chunks:  # type: ignore[type-var]
                found: list[Chunk] = []
                while not found or found[-1].usage.output_tokens < 3:
                    found.append(await asyncio.wait_for(anext(chunks), LIMIT_S))
                    assert found[-1].finish_reason is None


async def test_text_comes_with_that_of_others_when_half_of_the_delay_has_passed(
    checkpoint: Write,
) -> None:
    async with running(checkpoint(Shape()), NEVER) as engine:
        # It stops again before the end of the first answer, of which the text may not come with.
        with stopped_after(engine, 3) as decoder, stopped_after(engine, 8):
            chunks, others = engine.generate(WANTED), engine.generate(WANTED)
            await asyncio.wait_for(anext(chunks), LIMIT_S)
            await until(decoder.stopped.is_set)
            assert engine._releasing is not None
            engine._releasing.cancel()
            engine._releasing = engine._loop.call_later(NEVER / 4, engine._release)
            first = asyncio.ensure_future(anext(others))
            worker = engine._worker
            assert worker is not None
            await until(lambda: not worker._commands.empty())
            decoder.go_on.set()
            assert (await asyncio.wait_for(anext(chunks), LIMIT_S)).finish_reason is None
            await first


@pytest.mark.slow
def test_text_is_not_kept_for_less_than_a_millisecond(checkpoint: Write) -> None:
    """Ray Serve runs uvloop, whose timers count milliseconds: of less it makes no timer."""
    uvloop = pytest.importorskip("uvloop")
    failed: list[dict[str, Any]] = []

    async def answer() -> list[Chunk]:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with running(checkpoint(Shape()), 0.0004) as engine:
            chunks = [chunk async for chunk in engine.generate(WANTED)]
            assert engine._releasing is None, "the event loop turns without a pause"
        return chunks

    loop = uvloop.new_event_loop()
    try:
        found = loop.run_until_complete(answer())
    finally:
        loop.close()
    assert not failed
    assert found[-1].usage.output_tokens == 40


async def test_an_answer_that_nobody_reads_piecewise_waits_for_its_end(checkpoint: Write) -> None:
    async with running(checkpoint(Shape()), 0.001) as engine:
        with stopped_after(engine, 3) as decoder:
            async with aclosing(  # type: ignore[type-var]
                engine.generate(replace(WANTED, piecewise=False))
            ) as chunks:
                first = asyncio.ensure_future(anext(chunks))
                await until(decoder.stopped.is_set)
                await asyncio.sleep(0.01)
                assert not first.done()
                decoder.go_on.set()
                found = [await asyncio.wait_for(first, LIMIT_S)]
                found += [chunk async for chunk in chunks]
    assert found[-1].finish_reason is FinishReason.LENGTH
    assert found[-1].usage.output_tokens == 40


async def test_text_before_an_error_is_not_lost(checkpoint: Write) -> None:
    async with running(checkpoint(Shape()), NEVER) as engine:
        with stopped_after(engine, 3) as decoder:
            chunks = engine.generate(WANTED)
            await anext(chunks)
            await until(decoder.stopped.is_set)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0)
            decoder.go_on.set()
            assert (await anext(chunks)).text
            with pytest.raises(EngineUnavailable):
                _ = [chunk async for chunk in chunks]
            await closing


async def test_nothing_goes_on_without_requests(checkpoint: Write) -> None:
    async with running(checkpoint(Shape()), 0.001) as engine:
        for _ in range(2):
            assert [chunk async for chunk in engine.generate(WANTED)]
            await until(lambda: engine._releasing is None)
