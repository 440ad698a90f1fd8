"""What every engine must do, whatever computes its tokens.

A new engine gets a `Subject` in `test_conformance` and passes all of this. The tests see nothing of
an engine but `service.engine.Engine` and its subject's hooks; they assert no meaning, so random
weights will do.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from service.engine import Engine, load_of
from service.errors import (
    ContextTooLong,
    EngineUnavailable,
    GrammarError,
    InvalidRequest,
    Overloaded,
    TooManyImages,
    VisionDisabled,
)
from service.inference.request_checks import check_request
from service.tasks.contract import Task
from service.types import (
    DEFAULT_MAX_TOKENS,
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Chunk,
    EngineLoad,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    Sampling,
    Timings,
    Usage,
)
from tests.service.analysed import analysed as grammar

WAIT_S = 60.0
"""How long a test waits for what has to happen soon, on a machine that is busy with other work."""


@dataclass(frozen=True)
class Subject:
    """An engine under test.

    build: makes an engine that is not started. Keywords, all optional: ``vision`` False builds one
        without vision, ``small`` True one that runs one request and lets at most one more wait,
        ``max_images`` one that takes so many images in a request.
    idle: whether an engine holds nothing of any request: no slot, no memory, no place in a queue.
    certain: its answers are fixed beforehand, so that sampling has nothing to choose from.
    sensitive: its weights are random, so that whatever changes the prompt changes the answer.
    elsewhere: another process or thread computes, which learns a moment later that nobody waits.
    excluded: tests that do not hold for it, by name -> the reason.
    """

    name: str
    build: Callable[..., Engine]
    idle: Callable[[Engine], bool]
    certain: bool = False
    sensitive: bool = False
    elsewhere: bool = False
    excluded: Mapping[str, str] = field(default_factory=dict)


def schema(**properties: Any) -> Grammar:
    names = list(properties)
    content = {"type": "object", "properties": properties, "required": names}
    return grammar(GrammarKind.JSON_SCHEMA, content | {"additionalProperties": False})


SHORT = {"type": "string", "maxLength": 12}
GRAMMARS = [
    schema(shape=SHORT, count={"type": "integer", "minimum": 0, "maximum": 99}),
    schema(ok={"type": "boolean"}, none={"type": "null"}, level={"enum": ["low", "née", 3, None]}),
    schema(
        points={
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": {"type": "array", "prefixItems": [{"type": "integer", "maximum": 9, "minimum": 0}] * 2,
                      "minItems": 2, "maxItems": 2, "items": False},
        },
        inner={"type": "object", "properties": {"a": SHORT}, "required": ["a"],
               "additionalProperties": False},
    ),
    grammar(
        GrammarKind.JSON_SCHEMA,
        {"type": "array", "items": {"$ref": "#/$defs/word"}, "minItems": 2, "maxItems": 2,
         "$defs": {"word": {"type": "string", "minLength": 1, "maxLength": 8}}},
    ),
    grammar(GrammarKind.REGEX, r"[A-Z][a-z]{3,9} [0-9]{2}(st|nd|rd|th)"),
    grammar(GrammarKind.REGEX, r"(naïve|日本語|😀){1,4}"),
    grammar(
        GrammarKind.EBNF,
        'root ::= item (", " item){0,3}\nitem ::= [a-f]{1,4} ":" number\nnumber ::= [1-9] [0-9]?',
    ),
    grammar(GrammarKind.CHOICE, ["left", "right", "very far left"]),
    grammar(GrammarKind.CHOICE, ['a "quoted" \\ one', "日本語 😀", "née\tñ"]),
]  # fmt: skip
BROKEN = [
    Grammar(GrammarKind.JSON_SCHEMA, "{", "root ::= ("),
    Grammar(GrammarKind.REGEX, "(unclosed", "root ::= nothing"),
    Grammar(GrammarKind.EBNF, "rule ::= no root", "rule ::= no root"),
    Grammar(GrammarKind.CHOICE, "[]", "root ::= "),
]
LONG = grammar(GrammarKind.REGEX, "([a-z]{1,7} ){400}")
"""Goes on for at least 800 characters."""
MANY_TOKENS = 256
SPECIAL = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>"


def script(request: GenerateRequest) -> str:
    """Answers for an engine that has to be told what to say."""
    known = {
        GRAMMARS[4]: "Circle 42nd", GRAMMARS[5]: "日本語😀naïve", GRAMMARS[6]: "a:1, beef:42, c:7",
        LONG: "several words " * 200,
    }  # fmt: skip
    if request.grammar in known:
        return known[request.grammar]
    if request.grammar is None:
        return f"Nothing but text: {request.user[:200]} é日本語😀"
    from service.engines.fake import scripted

    return scripted(request.grammar)


def fits(constraint: Grammar, text: str) -> bool:
    """Whether a text obeys a grammar, by other means than the engine's where there are any."""
    if constraint.kind is GrammarKind.JSON_SCHEMA:
        validator = jsonschema.Draft202012Validator(json.loads(constraint.source))
        return bool(validator.is_valid(json.loads(text)))
    if constraint.kind is GrammarKind.REGEX:
        return re.fullmatch(constraint.source, text) is not None
    if constraint.kind is GrammarKind.CHOICE:
        return text in json.loads(constraint.source)
    info = xgrammar.TokenizerInfo([bytes([value]) for value in range(256)] + [b""],
                                  stop_token_ids=[256])  # fmt: skip
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(constraint.source)
    matcher = xgrammar.GrammarMatcher(compiled)
    return bool(matcher.accept_string(text) and matcher.is_completed())


def random_image(seed: int, width: int = 96, height: int = 64, **bounds: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(pixels, **bounds)


@dataclass(frozen=True)
class Closed:
    """An image that nobody may decode."""

    width: int
    height: int
    min_pixels: int
    max_pixels: int

    async def reduced(self, reduce: object, needs_bytes: int = 0) -> None:
        raise AssertionError("its pixels were asked for")


def request(
    user: str = "Describe the picture.",
    *images: Image,
    constraint: Grammar | None = None,
    system: str = "",
    **sampling: Any,
) -> GenerateRequest:
    options = Sampling(**{"max_tokens": 48, **sampling})
    return GenerateRequest("conformance", user, system, images, constraint, options)


def generate(engine: Engine, one: GenerateRequest) -> AsyncGenerator[Chunk, None]:
    chunks = engine.generate(one)
    assert isinstance(chunks, AsyncGenerator), "an answer must be possible to close"
    return chunks


async def collect(engine: Engine, one: GenerateRequest) -> list[Chunk]:
    async with aclosing(generate(engine, one)) as chunks:
        return [chunk async for chunk in chunks]


async def answer(engine: Engine, one: GenerateRequest) -> tuple[str, FinishReason | None, Usage]:
    chunks = await collect(engine, one)
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason, chunks[-1].usage


async def first_chunk(engine: Engine, one: GenerateRequest) -> AsyncGenerator[Chunk, None]:
    """Start a request and come back when it answers; the iterator stays open."""
    chunks = generate(engine, one)
    await asyncio.wait_for(anext(chunks), WAIT_S)
    return chunks


async def load_with(engine: Engine, *, running: int) -> EngineLoad:
    """The load once so many requests run; an engine may tell it a step late."""
    end = time.monotonic() + WAIT_S
    while (found := await load_of(engine)) is None or found.running != running:
        assert time.monotonic() < end, found
        await asyncio.sleep(0.002)
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail when it does not come true."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.002)


def mixed(count: int) -> list[GenerateRequest]:
    """Requests that differ in everything that a request can differ in."""
    result = []
    for index in range(count):
        images = [
            random_image(index * 7 + k, 40 + 24 * (index % 4), 40 + 32 * k)
            for k in range(index % 3)
        ]
        constraint = [*GRAMMARS, None][index % (len(GRAMMARS) + 1)]
        sampling: dict[str, Any] = {"max_tokens": 8 + index % 40}
        if index % 4 == 3:
            sampling |= {"temperature": 1.0, "seed": index, "top_k": 20, "top_p": 0.9}
        system = "Answer with JSON." if index % 2 else ""
        words = "the colour of a large red circle " * (1 + index % 5)
        result.append(request(words, *images, constraint=constraint, system=system, **sampling))
    return result


def declared(engine: Engine, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
    """Those that the engine says it can do."""
    kinds = engine.capabilities.grammar_kinds
    return [one for one in requests if one.grammar is None or one.grammar.kind in kinds]


@pytest.mark.asyncio(loop_scope="module")
class LifeCycle:
    """Engines that are started and closed by each test."""

    async def test_before_start(self, subject: Subject) -> None:
        engine = subject.build()
        with pytest.raises(EngineUnavailable) as raised:
            await collect(engine, request())
        assert raised.value.reason == "ENGINE_LOADING"
        with pytest.raises(EngineUnavailable):
            await engine.check_health()
        with pytest.raises(EngineUnavailable):
            await engine.prepare(GRAMMARS[0])
        await engine.close()

    async def test_start_health_and_use_after_close(self, subject: Subject) -> None:
        engine = subject.build()
        await engine.start()
        await engine.start()
        await engine.check_health()
        await collect(engine, request(max_tokens=2))
        await engine.close()
        await engine.close()
        with pytest.raises(EngineUnavailable) as raised:
            await collect(engine, request())
        assert raised.value.reason == "ENGINE_CLOSED"
        with pytest.raises(EngineUnavailable):
            await engine.check_health()
        with pytest.raises(EngineUnavailable):
            await engine.prepare(schema(new=SHORT))

    async def test_an_engine_that_tells_its_load_tells_the_truth(self, subject: Subject) -> None:
        engine = subject.build(small=True)
        assert await load_of(engine) is None, "before the start"
        await engine.start()
        try:
            if await load_of(engine) is None:
                pytest.skip("this engine does not tell its load")
            running = await first_chunk(engine, request(constraint=LONG, max_tokens=MANY_TOKENS))
            busy = await load_with(engine, running=1)
            await running.aclose()
            idle = await load_with(engine, running=0)
        finally:
            await engine.close()
        for one in (busy, idle):
            assert one.model
            assert one.kv_cache_used is None or 0 <= one.kv_cache_used <= 1

    async def test_close_ends_requests_in_flight(self, subject: Subject) -> None:
        engine = subject.build(small=True)
        await engine.start()
        running = await first_chunk(engine, request(constraint=LONG, max_tokens=MANY_TOKENS))
        waiting = None
        if not subject.certain:  # a fake does not queue
            waiting = asyncio.ensure_future(collect(engine, request(max_tokens=4)))
            await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(_rest(running), WAIT_S)
        if waiting is not None:
            with pytest.raises(EngineUnavailable):
                await asyncio.wait_for(waiting, WAIT_S)
        if subject.elsewhere:
            await until(lambda: subject.idle(engine))
        assert subject.idle(engine)

    async def test_threads_and_tasks_end_with_the_engine(self, subject: Subject) -> None:
        tasks, others = asyncio.all_tasks(), set(threading.enumerate())
        for _ in range(2):
            engine = subject.build()
            await engine.start()
            await collect(engine, request("Count.", random_image(1), constraint=GRAMMARS[0]))
            await engine.close()
        await until(lambda: not _engine_threads(others))
        # Those of the start may end meanwhile: gRPC clears up behind the engine of an earlier test.
        await until(lambda: asyncio.all_tasks() <= tasks)

    async def test_a_full_queue_is_overloaded(self, subject: Subject) -> None:
        """One runs and one waits; the third is refused, whatever time the other two take."""
        engine = subject.build(small=True)
        await engine.start()
        long = request(constraint=LONG, max_tokens=MANY_TOKENS)
        open_ones = [generate(engine, long) for _ in range(2)]
        pulls = [asyncio.ensure_future(anext(chunks)) for chunks in open_ones]
        await asyncio.sleep(0)  # both are in the engine now, and neither can have ended
        with pytest.raises(Overloaded) as raised:
            await collect(engine, long)
        assert raised.value.retry_after_s > 0
        await asyncio.wait_for(pulls[0], WAIT_S)  # the one that runs was not refused
        assert not pulls[1].done() or pulls[1].exception() is None, "nor was the one that waits"
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        for chunks in open_ones:
            await chunks.aclose()
        await until(lambda: subject.idle(engine))
        await collect(engine, request(max_tokens=2))
        await engine.close()

    async def test_as_many_images_as_the_limit(self, subject: Subject) -> None:
        engine = subject.build(max_images=3)
        await engine.start()
        assert engine.capabilities.max_images == 3
        shown = [random_image(seed, 64, 64) for seed in range(4)]
        for count in (2, 3):
            _, _, usage = await answer(engine, request("How many?", *shown[:count], max_tokens=1))
            assert usage.image_tokens >= count
        with pytest.raises(TooManyImages) as raised:
            await collect(engine, request("How many?", *shown, max_tokens=1))
        assert raised.value.metadata == {"limit": "3", "actual": "4"}
        await engine.close()

    async def test_without_vision(self, subject: Subject) -> None:
        engine = subject.build(vision=False)
        await engine.start()
        assert engine.capabilities.modalities == TEXT_ONLY
        assert engine.capabilities.max_images == 0
        with pytest.raises(VisionDisabled):
            await collect(engine, request("What is it?", random_image(1)))
        _, _, usage = await answer(engine, request("Text only.", max_tokens=3))
        assert usage.image_tokens == 0
        await engine.close()

    async def test_a_second_engine_gives_the_same_answers(self, subject: Subject) -> None:
        found = []
        for _ in range(2):
            engine = subject.build()
            await engine.start()
            found.append([(await answer(engine, one))[0] for one in declared(engine, mixed(6))])
            await engine.close()
        assert found[0] == found[1]


async def _rest(chunks: AsyncGenerator[Chunk, None]) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def _engine_threads(others: set[threading.Thread]) -> list[str]:
    names = ("front", "vision", "grammar", "reference-engine", "lmdeploy")
    here = set(threading.enumerate()) - others
    return [one.name for one in here if one.name.startswith(names)]


@pytest.mark.asyncio(loop_scope="module")
class Answers:
    """One engine, started once, for all of these."""

    async def test_capabilities(self, engine: Engine, subject: Subject) -> None:
        found = engine.capabilities
        assert found.model
        assert found.engine
        assert found.context_length > 0
        assert "max_tokens" in found.sampling_options
        assert found.sampling_options <= {field.name for field in fields(Sampling)}
        assert found.grammar_kinds <= set(GrammarKind)
        assert found.modalities == TEXT_AND_IMAGES
        assert found.max_images >= 1

    @pytest.mark.parametrize("images", [0, 1, 3])
    async def test_chunks(self, engine: Engine, subject: Subject, images: int) -> None:
        begun = time.monotonic()
        shown = [random_image(seed, 64, 32 * (1 + seed)) for seed in range(images)]
        chunks = await collect(engine, request("What is it? é日本語😀", *shown))
        wall_s = time.monotonic() - begun
        *pieces, last = chunks
        assert all(piece.finish_reason is None for piece in pieces)
        assert all(piece.timings == Timings() for piece in pieces)
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        usage, timings = last.usage, last.timings
        counts = [chunk.usage.output_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[0] >= 1
        assert all(
            replace(chunk.usage, output_tokens=0) == replace(usage, output_tokens=0)
            for chunk in chunks
        )
        assert usage.prompt_tokens > usage.image_tokens >= images
        assert (usage.image_tokens > 0) == (images > 0)
        assert 0 < usage.output_tokens <= 48
        assert 0 <= timings.queue_s <= timings.first_token_s <= timings.total_s <= wall_s

    async def test_text_comes_in_pieces_of_whole_characters(
        self, engine: Engine, subject: Subject
    ) -> None:
        constraint = None if subject.certain else grammar(GrammarKind.REGEX, "([日本語é😀] ){24}")
        one = request("é日本語😀 " * 6, constraint=constraint, max_tokens=MANY_TOKENS)
        chunks = await collect(engine, one)
        assert chunks[-1].finish_reason is FinishReason.STOP
        assert len([chunk for chunk in chunks if chunk.text]) > 1
        for chunk in chunks:
            assert "\ufffd" not in chunk.text
            assert chunk.text.encode().decode() == chunk.text

    @pytest.mark.parametrize("index", range(len(GRAMMARS)))
    async def test_an_answer_fits_its_grammar(
        self, engine: Engine, subject: Subject, index: int
    ) -> None:
        constraint = GRAMMARS[index]
        if constraint.kind not in engine.capabilities.grammar_kinds:
            with pytest.raises(GrammarError) as raised:
                _admit(engine, constraint)
            assert raised.value.reason == "GRAMMAR_KIND_UNSUPPORTED"
            return
        _admit(engine, constraint)
        for turn in range(1 if subject.certain else 4):
            hot = {"temperature": 2.0, "seed": turn} if turn else {}
            images = [random_image(turn)] if turn % 2 else []
            one = request("Any.", *images, constraint=constraint, max_tokens=MANY_TOKENS, **hot)
            text, reason, _ = await answer(engine, one)
            assert reason is FinishReason.STOP
            assert fits(constraint, text), text
            assert "\ufffd" not in text

    @pytest.mark.parametrize("constraint", BROKEN, ids=lambda one: one.kind.value)
    async def test_a_broken_grammar(
        self, engine: Engine, subject: Subject, constraint: Grammar
    ) -> None:
        if constraint.kind not in engine.capabilities.grammar_kinds:
            with pytest.raises(GrammarError):
                _admit(engine, constraint)
            return
        with pytest.raises(GrammarError):
            await engine.prepare(constraint)
        with pytest.raises(GrammarError):
            await collect(engine, request(constraint=constraint))
        await until(lambda: subject.idle(engine))

    async def test_undeclared_options_are_refused_by_name(
        self, engine: Engine, subject: Subject
    ) -> None:
        used = Sampling(max_tokens=7, temperature=0.5, top_p=0.5, top_k=5, repetition_penalty=1.5,
                        seed=1, thinking=True)  # fmt: skip
        task = Task("test", "", "", "Any.")
        honoured = engine.capabilities.sampling_options
        for option in fields(Sampling):
            only = replace(Sampling(), **{option.name: getattr(used, option.name)})
            if option.name in honoured:
                check_request(engine.capabilities, task, [], only, "id")
                continue
            with pytest.raises(InvalidRequest) as raised:
                check_request(engine.capabilities, task, [], only, "id")
            assert [one.field for one in raised.value.violations] == [f"sampling.{option.name}"]

    async def test_options_are_honoured(self, engine: Engine, subject: Subject) -> None:
        honoured = engine.capabilities.sampling_options
        image = random_image(4)  # no two tokens of its answer are equally likely

        async def text(**sampling: Any) -> str:
            return (await answer(engine, request("Say anything.", image, **sampling)))[0]

        greedy = await text()
        assert await text() == greedy
        if subject.certain or "temperature" not in honoured:
            return
        hot = {"temperature": 2.0}
        if "seed" in honoured:
            seeded = [await text(**hot, seed=seed) for seed in (1, 2, 3, 2**64 - 1)]
            assert len(set(seeded)) > 1
            assert await text(**hot, seed=2) == seeded[1]
        assert len({await text(**hot) for _ in range(4)}) > 1, "without a seed one is drawn"
        if "top_k" in honoured:
            assert await text(**hot, top_k=1) == greedy
        if "top_p" in honoured:
            assert await text(**hot, top_p=1e-6) == greedy
        if "repetition_penalty" in honoured:
            assert await text(repetition_penalty=10.0) != greedy

    @pytest.mark.parametrize("most", [1, 2, 5, 31])
    async def test_max_tokens(self, engine: Engine, subject: Subject, most: int) -> None:
        constraint = LONG if LONG.kind in engine.capabilities.grammar_kinds else None
        user = "long " * 100
        text, reason, usage = await answer(
            engine, request(user, constraint=constraint, max_tokens=most)
        )
        assert reason is FinishReason.LENGTH
        assert usage.output_tokens == most
        assert text

    async def test_context(self, engine: Engine, subject: Subject) -> None:
        context = engine.capabilities.context_length
        _, _, usage = await answer(engine, request("Fits.", max_tokens=1))
        room = context - usage.prompt_tokens
        for most in (room - 1, room):
            fits = request("Fits.", constraint=GRAMMARS[0], max_tokens=most)
            _, reason, _ = await answer(engine, fits)
            assert reason is FinishReason.STOP
        for one in (request("Fits.", max_tokens=room + 1), request("word 1 " * context)):
            with pytest.raises(ContextTooLong) as raised:
                await collect(engine, one)
            assert raised.value.violations[0].field in ("sampling.max_tokens", "task")
        # Enlarging it would take more memory than there is: refused before it is touched.
        vast = random_image(1, min_pixels=2**32 - 1, max_pixels=2**32 - 1)
        with pytest.raises(ContextTooLong) as raised:
            await collect(engine, request("x", vast))
        assert raised.value.violations[0].field == "images"
        with pytest.raises(ContextTooLong) as raised:
            await collect(engine, request("word 1 " * context, random_image(1)))
        assert raised.value.violations[0].field == "task"
        closed: Any = Closed(4096, 4096, min_pixels=4096 * 4096, max_pixels=4096 * 4096)
        with pytest.raises(ContextTooLong):
            await collect(engine, request("x", *[closed] * (1 + context // 4096)))
        await until(lambda: subject.idle(engine))

    async def test_unset_max_tokens_gets_what_the_context_leaves(self, engine: Engine) -> None:
        context = engine.capabilities.context_length

        def words(number: int, **sampling: Any) -> GenerateRequest:
            return request("word " * number, constraint=LONG, **sampling)

        few, more = [(await answer(engine, words(n, max_tokens=1)))[2] for n in (10, 20)]
        per_word = (more.prompt_tokens - few.prompt_tokens) / 10
        number = int((context - few.prompt_tokens) / per_word) - 5
        _, reason, usage = await answer(engine, words(number, max_tokens=None))
        assert reason is FinishReason.LENGTH
        assert usage.prompt_tokens + usage.output_tokens == context
        assert 1 <= usage.output_tokens < DEFAULT_MAX_TOKENS
        with pytest.raises(ContextTooLong) as raised:
            await collect(engine, words(2 * number, max_tokens=None))
        assert raised.value.violations[0].field == "task"

    async def test_special_tokens_in_texts_are_text(self, engine: Engine, subject: Subject) -> None:
        plain = (await answer(engine, request("Hi.", max_tokens=1)))[2]
        typed = (await answer(engine, request(f"Hi.{SPECIAL}", max_tokens=1)))[2]
        assert typed.image_tokens == 0
        assert typed.prompt_tokens >= plain.prompt_tokens + 7, "each is more than one token"
        one = (await answer(engine, request("Hi.", random_image(1), max_tokens=1)))[2]
        both = (await answer(engine, request(f"Hi.{SPECIAL}", random_image(1), max_tokens=1)))[2]
        assert both.image_tokens == one.image_tokens > 0
        system = (await answer(engine, request("Hi.", system=SPECIAL, max_tokens=1)))[2]
        assert system.image_tokens == 0

    async def test_special_tokens_in_a_schema_are_text(
        self, engine: Engine, subject: Subject
    ) -> None:
        """Where the prompt shows the schema, it is a text of the system turn, to the token."""
        shown = grammar(GrammarKind.JSON_SCHEMA, {"const": 1, "description": SPECIAL})
        task = Task("t", "", "Hi.", grammar=shown, schema_in_prompt=True)
        asked = check_request(engine.capabilities, task, [], Sampling(max_tokens=9), "r")
        assert json.dumps(SPECIAL)[1:-1] in asked.system
        text, _, usage = await answer(engine, asked)
        typed = request("Hi.", system=asked.system, constraint=shown, max_tokens=9)
        assert (text, usage) == ("1", (await answer(engine, typed))[2])
        assert usage.image_tokens == 0

    async def test_special_tokens_in_answers_are_text(
        self, engine: Engine, subject: Subject
    ) -> None:
        if GrammarKind.CHOICE not in engine.capabilities.grammar_kinds:
            pytest.skip("the engine has no choices")
        constraint = grammar(GrammarKind.CHOICE, [SPECIAL])
        text, reason, _ = await answer(
            engine, request(constraint=constraint, max_tokens=MANY_TOKENS)
        )
        assert (text, reason) == (SPECIAL, FinishReason.STOP)

    async def test_usage_counts_every_image(self, engine: Engine, subject: Subject) -> None:
        async def usage(*images: Image) -> Usage:
            return (await answer(engine, request("Hi.", *images, max_tokens=1)))[2]

        first, second = random_image(1, 64, 64), random_image(2, 192, 96)
        alone = [await usage(first), await usage(second), await usage()]
        both = await usage(first, second)
        assert both.image_tokens == alone[0].image_tokens + alone[1].image_tokens
        text = [one.prompt_tokens - one.image_tokens for one in (*alone, both)]
        assert text[2] <= text[0] == text[1] <= text[3]
        assert alone[2].image_tokens == 0

    async def test_bounds_of_one_image(self, engine: Engine, subject: Subject) -> None:
        async def image_tokens(*images: Image) -> int:
            return (await answer(engine, request("Hi.", *images, max_tokens=1)))[2].image_tokens

        large, small = random_image(1, 256, 256), random_image(2, 64, 64)
        shrunk = random_image(1, 256, 256, max_pixels=96 * 96)
        grown = random_image(2, 64, 64, min_pixels=320 * 320, max_pixels=400 * 400)
        counts = [await image_tokens(one) for one in (large, shrunk, small, grown)]
        assert counts[1] < counts[0]
        assert counts[1] <= 9
        assert counts[3] > counts[2]
        assert counts[3] >= 100
        assert await image_tokens(shrunk, small, grown) == sum(counts[1:])

    async def test_the_order_of_images_matters(self, engine: Engine, subject: Subject) -> None:
        if not subject.sensitive:
            pytest.skip("two noisy images need not change its answer")
        first, second = random_image(11, 64, 64), random_image(12, 64, 64)
        sampling = {"temperature": 1.0, "seed": 1}
        texts = [
            (await answer(engine, request("Which?", *images, **sampling)))[0]
            for images in ((first, second), (second, first), (first, first))
        ]
        assert len(set(texts)) == 3

    async def test_concurrent_answers_are_those_alone(
        self, engine: Engine, subject: Subject
    ) -> None:
        requests = declared(engine, mixed(33))
        alone = [await answer(engine, one) for one in requests]
        together = await asyncio.gather(*(answer(engine, one) for one in requests))
        assert list(together) == alone
        await until(lambda: subject.idle(engine))

    async def test_closing_the_iterator_frees_everything(
        self, engine: Engine, subject: Subject
    ) -> None:
        constraint = LONG if LONG.kind in engine.capabilities.grammar_kinds else None
        one = request("word " * 90, random_image(1), constraint=constraint, max_tokens=MANY_TOKENS)
        unstarted = generate(engine, one)
        await unstarted.aclose()
        chunks = await first_chunk(engine, one)
        await chunks.aclose()
        await until(lambda: subject.idle(engine))
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        await engine.check_health()

    async def test_random_cancels_leak_nothing(
        self, engine: Engine, subject: Subject, cancels: int
    ) -> None:
        rng = random.Random(1)
        requests = [replace(one, sampling=replace(one.sampling, max_tokens=MANY_TOKENS))
                    for one in declared(engine, mixed(22))]  # fmt: skip
        expected = await answer(engine, requests[1])
        tasks = asyncio.all_tasks()
        limit = asyncio.Semaphore(24)

        async def cancelled(one: GenerateRequest) -> None:
            async with limit:
                if rng.random() < 0.5:
                    await _taken(engine, one, rng.randrange(1, 12))
                else:
                    await _interrupted(collect(engine, one), rng.random() * 0.05)

        for _ in range(cancels // 50):
            await asyncio.gather(*(cancelled(rng.choice(requests)) for _ in range(50)))
            await engine.check_health()
        await until(lambda: subject.idle(engine))
        await until(lambda: asyncio.all_tasks() <= tasks)  # one from before may have ended
        assert await answer(engine, requests[1]) == expected


def _admit(engine: Engine, constraint: Grammar) -> None:
    """What a server asks before an engine gets a request."""
    task = Task("test", "", "", "Any.", grammar=constraint)
    check_request(engine.capabilities, task, [], Sampling(), "id")


async def _taken(engine: Engine, one: GenerateRequest, count: int) -> None:
    """Take some chunks and close."""
    async with aclosing(generate(engine, one)) as chunks:
        async for _ in chunks:
            count -= 1
            if not count:
                return


async def _interrupted(work: Awaitable[Any], after_s: float) -> None:
    """Cancel something after a while, wherever it is."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
