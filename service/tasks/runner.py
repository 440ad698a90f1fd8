"""Runs a task on an engine: checks, generation under a timeout, reading and validation.

The order is fixed. Whatever can be refused is refused before the engine works, and an answer that
was cut never reaches a parser.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from service.engine import Engine
from service.errors import (
    FieldViolation,
    GrammarError,
    InferenceTimeout,
    InternalError,
    InvalidRequest,
    NoUsableFields,
    OutputInvalid,
    OutputTruncated,
    VisionDisabled,
)
from service.tasks.answers import AnswerValidator, parse_json
from service.tasks.contract import Task, TaskResult
from service.tasks.grammar_checks import check_answer
from service.tasks.schema import DEFAULT_LIMITS, SchemaLimits
from service.timeouts import wait_until
from service.types import (
    Capabilities,
    Chunk,
    FinishReason,
    GenerateRequest,
    Grammar,
    GrammarKind,
    Image,
    Sampling,
)

T = TypeVar("T")
COMPILE_TIMEOUT_S = 5.0
DEFAULT_SAMPLING = Sampling()


async def run(
    engine: Engine,
    task: Task,
    images: Sequence[Image],
    sampling: Sampling,
    *,
    timeout_s: float,
    request_id: str,
    accept_empty: bool = False,
    limits: SchemaLimits = DEFAULT_LIMITS,
    compile_timeout_s: float = COMPILE_TIMEOUT_S,
) -> TaskResult:
    """The validated answer. Raises a ``ServiceError``; cancelling the caller cancels the work in
    the engine.

    limits: those with which the task's grammar was admitted.
    compile_timeout_s: most seconds in which the engine has to have the grammar ready.
    """
    request = check_request(engine.capabilities, task, images, sampling, request_id)

    async def answered() -> TaskResult:
        answer = await _collect(engine, request, compile_timeout_s)
        return await _finish(task, answer, sampling, accept_empty, limits)

    return await _Deadline(timeout_s).wait(answered())


async def stream(
    engine: Engine,
    task: Task,
    images: Sequence[Image],
    sampling: Sampling,
    *,
    timeout_s: float,
    request_id: str,
    accept_empty: bool = False,
    limits: SchemaLimits = DEFAULT_LIMITS,
    compile_timeout_s: float = COMPILE_TIMEOUT_S,
) -> AsyncIterator[str | TaskResult]:
    """Pieces of the answer as they come, then the validated whole. The pieces promise nothing
    before that.

    Closing the iterator cancels the work in the engine.
    """
    request = check_request(engine.capabilities, task, images, sampling, request_id)
    answer = _Answer()
    deadline = _Deadline(timeout_s)
    if request.grammar is not None:
        await deadline.wait(_prepare(engine, request.grammar, compile_timeout_s))
    async with _closing(engine.generate(request)) as chunks, _naming(request.grammar):
        while (chunk := await deadline.wait(_next(chunks))) is not None:
            answer.add(chunk)
            if chunk.text:
                yield chunk.text
    yield await deadline.wait(_finish(task, answer, sampling, accept_empty, limits))


def check_request(
    capabilities: Capabilities,
    task: Task,
    images: Sequence[Image],
    sampling: Sampling,
    request_id: str,
) -> GenerateRequest:
    """What the engine will get, if it can do it; raises before anything has been computed."""
    check_sampling(sampling, capabilities)
    _check_images(task, images, capabilities)
    kinds = capabilities.grammar_kinds
    if task.grammar is not None and task.grammar.kind not in kinds:
        supported = ", ".join(sorted(kind.value for kind in kinds)) or "none"
        raise GrammarError(
            "task.inline.grammar",
            f"{task.grammar.kind.value} is not a kind of grammar that this engine has; "
            f"it has: {supported}",
            reason="GRAMMAR_KIND_UNSUPPORTED",
            metadata={"kind": task.grammar.kind.value, "supported": supported},
        )
    return GenerateRequest(
        request_id=request_id,
        user=task.user,
        system=task.system,
        images=tuple(images),
        grammar=task.grammar,
        sampling=sampling,
    )


def _whole(value: object, low: int, high: int | None = None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= low and (high is None or value <= high)


def _real(value: object, low: float, high: float, *, open_low: bool = False) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return (value > low if open_low else value >= low) and value <= high


def check_sampling(sampling: Sampling, capabilities: Capabilities) -> None:
    """Refuse, all at once, options out of range and options that the engine would ignore."""
    if sampling == DEFAULT_SAMPLING:
        return
    found: list[FieldViolation] = []

    def expect(name: str, fits: bool, allowed: str) -> None:
        if not fits:
            found.append(FieldViolation(f"sampling.{name}", f"must be {allowed}"))

    expect("max_tokens", _whole(sampling.max_tokens, 1), "at least 1")
    expect("temperature", _real(sampling.temperature, 0, 2), "a finite number from 0 to 2")
    expect("top_p", _real(sampling.top_p, 0, 1, open_low=True), "above 0 and at most 1")
    # Sampling writes "all tokens" as 0; callers leave the option out.
    expect("top_k", _whole(sampling.top_k, 0), "at least 1")
    penalty = _real(sampling.repetition_penalty, 0, 10, open_low=True)
    expect("repetition_penalty", penalty, "above 0 and at most 10")
    seed = sampling.seed is None or _whole(sampling.seed, 0, 2**64 - 1)
    expect("seed", seed, "a 64-bit unsigned integer")
    honoured = capabilities.sampling_options
    for option in fields(Sampling):
        value = getattr(sampling, option.name)
        if option.name not in honoured and value != option.default:
            known = ", ".join(sorted(honoured)) or "none"
            description = f"is not honoured by this engine, which has: {known}; leave it out"
            found.append(FieldViolation(f"sampling.{option.name}", description))
    if found:
        first, *rest = found
        raise InvalidRequest(
            first.field, first.description, reason="SAMPLING_OPTION_INVALID", more=tuple(rest)
        )


def _check_images(task: Task, images: Sequence[Image], capabilities: Capabilities) -> None:
    if task.needs_image and not images:
        raise InvalidRequest(
            "images", "this task needs at least one picture", reason="IMAGE_REQUIRED"
        )
    if images and not capabilities.vision:
        raise VisionDisabled(
            "This model runs without vision: send the request without pictures, "
            "or ask the operator for a model with vision."
        )
    limit = capabilities.max_images
    if task.max_images is not None:
        limit = min(limit, task.max_images)
    if len(images) > limit:
        raise InvalidRequest(
            "images",
            f"has {len(images)} pictures, at most {limit} are allowed",
            reason="TOO_MANY_IMAGES",
            metadata={"limit": str(limit), "actual": str(len(images))},
        )


class _Deadline:
    """One timeout over several waits."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.at = asyncio.get_running_loop().time() + timeout_s

    async def wait(self, work: Awaitable[T]) -> T:
        """The result of the work, or ``InferenceTimeout``; the work is cancelled then."""
        clock = asyncio.get_running_loop().time
        try:
            return await wait_until(work, self.at)
        except asyncio.TimeoutError:
            if clock() < self.at:  # not ours: something within the work ran into its own
                raise
            raise InferenceTimeout(
                f"Inference took longer than {self.timeout_s:g} s. Send fewer or smaller pictures, "
                "ask for fewer tokens, or try again when the server has less to do.",
                metadata={"timeout_s": f"{self.timeout_s:g}"},
            ) from None


@asynccontextmanager
async def _closing(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Close the engine's iterator however the body ends; that is what stops the work and frees
    it."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


@asynccontextmanager
async def _naming(grammar: Grammar | None) -> AsyncIterator[None]:
    """An engine knows the grammar of a request; the caller knows it by the field of the message."""
    try:
        yield
    except GrammarError as error:
        if grammar is None:
            raise
        what = error.violations[0].description
        raise GrammarError(
            _field(grammar), what, reason=error.reason, metadata=error.metadata
        ) from error


def _field(grammar: Grammar) -> str:
    return f"task.inline.grammar.{grammar.kind.value}"


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    async for chunk in chunks:
        return chunk
    return None


async def _collect(engine: Engine, request: GenerateRequest, compile_timeout_s: float) -> _Answer:
    answer = _Answer()
    if request.grammar is not None:
        await _prepare(engine, request.grammar, compile_timeout_s)
    async with _closing(engine.generate(request)) as chunks, _naming(request.grammar):
        async for chunk in chunks:
            answer.add(chunk)
    return answer


async def _prepare(engine: Engine, grammar: Grammar, timeout_s: float) -> None:
    """The grammar, compiled; the caller of one that takes too long has its answer in time."""
    clock = asyncio.get_running_loop().time
    limit = clock() + timeout_s
    try:
        async with _naming(grammar):
            await wait_until(engine.prepare(grammar), limit)
    except asyncio.TimeoutError:
        if clock() < limit:  # not ours
            raise
        raise GrammarError(
            _field(grammar),
            f"takes longer than {timeout_s:g} s to compile; make it smaller",
            reason="GRAMMAR_COMPILE_TIMEOUT",
            metadata={"limit_s": f"{timeout_s:g}"},
        ) from None


@dataclass(slots=True)
class _Answer:
    """The chunks of one answer, put together."""

    parts: list[str] = field(default_factory=list)
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        self.parts.append(chunk.text)
        self.last = chunk


async def _finish(
    task: Task, answer: _Answer, sampling: Sampling, accept_empty: bool, limits: SchemaLimits
) -> TaskResult:
    """Judge and read what was generated. Where reading is work, it leaves the event loop."""
    last = answer.last
    if last is None or last.finish_reason is None:
        raise InternalError("The engine ended without saying why.")
    if last.finish_reason is not FinishReason.STOP:
        raise _truncated(last, sampling)
    text = "".join(answer.parts)
    if not text.strip():
        raise OutputInvalid("The model's answer is empty.", metadata={"keyword": "empty"})
    value, as_json = (
        (text, None)
        if _takes_any_text(task)
        else await asyncio.to_thread(read_answer, task, text, accept_empty, limits)
    )
    return TaskResult(
        text=text,
        value=value,
        usage=last.usage,
        finish_reason=last.finish_reason,
        timings=last.timings,
        json=as_json,
    )


def _takes_any_text(task: Task) -> bool:
    return all(part is None for part in (task.grammar, task.parse, task.usable, task.document))


def _truncated(last: Chunk, sampling: Sampling) -> OutputTruncated:
    reason, tokens = last.finish_reason, last.usage.output_tokens
    if reason is FinishReason.LOOP:
        why = f"it began to repeat itself and was ended after {tokens} tokens; change the prompt"
    else:
        why = f"it needs more than {tokens} tokens; raise sampling.max_tokens"
    return OutputTruncated(
        f"The answer is not complete: {why}.",
        metadata={
            "finish_reason": reason.value if reason else "",
            "output_tokens": str(tokens),
            "max_tokens": str(sampling.max_tokens),
        },
    )


def read_answer(
    task: Task, text: str, accept_empty: bool = False, limits: SchemaLimits = DEFAULT_LIMITS
) -> tuple[Any, str | None]:
    """Parse and validate a complete answer. Returns its value, and its JSON text where it is
    JSON."""
    grammar = task.grammar
    is_json = grammar is not None and grammar.kind is GrammarKind.JSON_SCHEMA
    parser = task.parse or (parse_json if is_json else str)
    value = parser(text)
    if task.usable is not None and not accept_empty and not task.usable(value):
        raise NoUsableFields(
            "The answer says nothing usable about the pictures; "
            "set accept_empty to get such answers, too."
        )
    document = value if task.document is None else task.document(value)
    if grammar is not None and is_json:
        tidied = task.parse is None or task.document is not None
        AnswerValidator(grammar.source, limits).check(document if tidied else parse_json(text))
    elif grammar is not None:
        check_answer(grammar, text, limits)
    if task.document is not None:
        return value, json.dumps(document, ensure_ascii=False)
    return value, text if is_json else None
