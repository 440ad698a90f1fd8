"""Runs a task on an engine: checks, generation within a time limit, parsing and validation.

The order is fixed: every check of the request comes before the engine starts, and a truncated
answer never reaches a parser.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from service.deadlines import Deadline
from service.engine import Engine
from service.errors import (
    InferenceTimeout,
    InternalError,
    NoUsableFields,
    OutputInvalid,
    OutputTruncated,
)
from service.inference.calls import Answer
from service.inference.request_checks import (
    check_request,
    on_engine,
    schema_note,
    takes_any_text,
)
from service.inference.stops import until_stop
from service.logs import OUTPUT_LOGGER, pairs
from service.observation import CallRecord, current
from service.schema_compiler.budget import DEFAULT_SECONDS, DEFAULT_STEPS
from service.schema_compiler.frontend.checked_schema import is_known
from service.schema_compiler.grammar_checks import check_answer
from service.schema_compiler.limits import DEFAULT_LIMITS, SchemaLimits
from service.schema_compiler.report import Enforcement
from service.structured_output.answers import AnswerValidator, NotInTime, invalid, parse_json
from service.structured_output.compilation import COMPILE_TIMEOUT_S, naming, prepare
from service.structured_output.prefix_check import PrefixCheck, prefix_check
from service.tasks.contract import Task
from service.types import (
    DEFAULT_MAX_TOKENS,
    Capabilities,
    Chunk,
    FinishReason,
    GenerateRequest,
    GrammarKind,
    ImageSource,
    Sampling,
    Timings,
    Usage,
)

output_log = logging.getLogger(OUTPUT_LOGGER)

GREEDY = Sampling()
SECOND_TEMPERATURE, SECOND_TOP_P, SECOND_TOP_K = 0.7, 0.8, 20
"""Options of further attempts at a greedy answer, as far as the engine has them and the caller sets no
others."""
SCHEMA_HINT = "; schema_in_prompt: false leaves the JSON schema out of the prompt"
INLINE_CHARACTERS = 8192
INLINE_S, INLINE_STEPS = 0.002, 50_000
"""Length of answers that are validated on the event loop, and the limits of that."""
CUT = frozenset({FinishReason.LENGTH, FinishReason.LOOP})
"""Finish reasons of a text that is not complete."""


async def run(
    engine: Engine,
    task: Task,
    images: Sequence[ImageSource],
    sampling: Sampling,
    *,
    timeout_s: float,
    request_id: str,
    accept_empty: bool = False,
    accept_cut: bool = False,
    strict: bool = False,
    stop: Sequence[str] = (),
    limits: SchemaLimits = DEFAULT_LIMITS,
    compile_timeout_s: float = COMPILE_TIMEOUT_S,
    retries: int = 0,
) -> Answer:
    """Run the task and return the validated answer. Raises a ``ServiceError``. Cancelling this
    coroutine cancels the request in the engine.

    timeout_s: time limit for all attempts together.
    accept_cut, strict, stop: see ``Call``. Whether the grammar is enforced was checked before.
    limits: size limits under which the task's grammar was analysed.
    compile_timeout_s: time limit for the engine to compile the grammar.
    retries: maximum number of further attempts, made only if another attempt can give a different
        answer. Further attempts at a greedy answer are sampled, see `_sampling_of`.
    """
    capabilities = engine.capabilities
    task = on_engine(task, capabilities)
    deadline = Deadline(timeout_s)
    request = check_request(
        capabilities,
        task,
        images,
        sampling,
        request_id,
        stop,
        strict=strict,
        deadline=deadline.at,
        piecewise=bool(stop),
    )
    attempts = 1 + (retries if _another_may_fit(task, sampling, capabilities) else 0)

    async def answered() -> Answer:
        if task.grammar is not None:
            await prepare(engine, task.grammar, task.grammar_field, compile_timeout_s)
        thrown_away: list[Chunk] = []
        while True:
            options = _sampling_of(sampling, len(thrown_away), capabilities)
            again = request if options is sampling else replace(request, sampling=options)
            collected = _Chunks(await _check(task, capabilities, limits))
            try:
                await _collect(engine, again, task, stop, collected)
                result = await _finish(
                    task, collected, sampling, capabilities, accept_empty, accept_cut, limits
                )
            except OutputInvalid as error:  # found here, or by a server behind the engine
                thrown_away.append(collected.spent())
                error.metadata["attempts"] = str(len(thrown_away))
                if len(thrown_away) == attempts:
                    raise _advised(error, task, attempts, streamed=False) from None
            else:
                return _together(thrown_away, result)

    return await deadline.wait(answered(), partial(_too_slow, timeout_s))


async def stream(
    engine: Engine,
    task: Task,
    images: Sequence[ImageSource],
    sampling: Sampling,
    *,
    timeout_s: float,
    request_id: str,
    accept_empty: bool = False,
    accept_cut: bool = False,
    strict: bool = False,
    stop: Sequence[str] = (),
    limits: SchemaLimits = DEFAULT_LIMITS,
    compile_timeout_s: float = COMPILE_TIMEOUT_S,
) -> AsyncIterator[str | Answer]:
    """Yield the chunks of the answer as they are generated, then the validated answer. There is only
    one attempt, because chunks that were sent cannot be taken back.

    Closing the iterator cancels the request in the engine.
    """
    capabilities = engine.capabilities
    task = on_engine(task, capabilities)
    deadline, late = Deadline(timeout_s), partial(_too_slow, timeout_s)
    request = check_request(
        capabilities,
        task,
        images,
        sampling,
        request_id,
        stop,
        strict=strict,
        deadline=deadline.at,
    )
    collected = _Chunks(await deadline.wait(_check(task, capabilities, limits), late))
    if task.grammar is not None:
        field = task.grammar_field
        await deadline.wait(prepare(engine, task.grammar, field, compile_timeout_s), late)
    try:
        async with _generating(engine, request, task, stop) as chunks:
            while (chunk := await deadline.wait(_next(chunks), late)) is not None:
                collected.add(chunk)
                if chunk.text:
                    yield chunk.text
        finishing = _finish(
            task, collected, sampling, capabilities, accept_empty, accept_cut, limits
        )
        answer = await deadline.wait(finishing, late)
    except OutputInvalid as error:
        raise _advised(error, task, 1, streamed=True) from None
    yield answer


async def _check(
    task: Task, capabilities: Capabilities, limits: SchemaLimits
) -> PrefixCheck | None:
    """What finds violations before the answer ends; None where the grammar rules them out, and where
    the answer is not validated as it is written. A schema that is new to this process takes time, so
    it is read in a thread; to wake one for another schema would take longer than the work."""
    grammar, report = task.grammar, task.report
    if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA or report is None:
        return None
    if task.document is not None or not _is_checked(task):
        return None
    make = partial(prefix_check, grammar, report, capabilities, limits)
    return make() if is_known(grammar.source, limits) else await asyncio.to_thread(make)


def _is_checked(task: Task) -> bool:
    return task.report is not None and task.report.enforcement is Enforcement.CHECKED


def _another_may_fit(task: Task, sampling: Sampling, capabilities: Capabilities) -> bool:
    """Whether another attempt can give a different answer: not if the grammar enforces every
    keyword, and not if the engine can only be greedy."""
    can_sample = sampling.temperature > 0 or "temperature" in capabilities.sampling_options
    return _is_checked(task) and can_sample


def _sampling_of(sampling: Sampling, attempt: int, capabilities: Capabilities) -> Sampling:
    """The options of an attempt. Further attempts at a greedy answer are sampled as the model card of
    Qwen3-VL has it, with a seed that follows from that of the call, so that the same call gets the
    same answer."""
    if attempt == 0:
        return sampling
    if sampling.temperature > 0:
        return replace(sampling, seed=seed_of(sampling.seed, attempt))
    wanted: dict[str, Any] = {"temperature": SECOND_TEMPERATURE}
    if sampling.top_p == GREEDY.top_p:
        wanted["top_p"] = SECOND_TOP_P
    if sampling.top_k == GREEDY.top_k:
        wanted["top_k"] = SECOND_TOP_K
    wanted["seed"] = seed_of(sampling.seed or 0, attempt)
    honoured = capabilities.sampling_options
    return replace(sampling, **{name: wanted[name] for name in wanted if name in honoured})


def _advised(error: OutputInvalid, task: Task, attempts: int, *, streamed: bool) -> OutputInvalid:
    """The error, with how to get another attempt where one can help."""
    if not _is_checked(task):
        return error
    if streamed:
        how = "A stream has one attempt; a call without streaming can have a second one."
    elif attempts > 1:
        how = f"All {attempts} attempts failed; another seed gives others."
    else:
        how = "A temperature above 0 with another seed gives other answers."
    return OutputInvalid(f"{error.message} {how}", metadata=error.metadata)


def seed_of(seed: int | None, attempt: int) -> int | None:
    """The seed of an attempt: the caller's seed for attempt 0, a seed derived from it for later
    ones."""
    if seed is None or attempt == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _together(thrown_away: Sequence[Chunk], result: Answer) -> Answer:
    """The answer with the summed tokens and times of all attempts."""
    if not thrown_away:
        return result
    usages = [*(chunk.usage for chunk in thrown_away), result.usage]
    before_s = sum(chunk.timings.total_s for chunk in thrown_away)
    last = result.timings
    return replace(
        result,
        attempts=len(usages),
        usage=Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            image_tokens=sum(usage.image_tokens for usage in usages),
            output_tokens=sum(usage.output_tokens for usage in usages),
        ),
        timings=Timings(
            queue_s=sum(chunk.timings.queue_s for chunk in thrown_away) + last.queue_s,
            first_token_s=before_s + last.first_token_s,
            total_s=before_s + last.total_s,
        ),
    )


def _too_slow(timeout_s: float) -> InferenceTimeout:
    return InferenceTimeout(
        f"Inference took longer than {timeout_s:g} s. Send fewer or smaller images, "
        "ask for fewer tokens, or try again when the server is less busy.",
        metadata={"timeout_s": f"{timeout_s:g}"},
    )


@asynccontextmanager
async def _generating(
    engine: Engine, request: GenerateRequest, task: Task, stop: Sequence[str]
) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Yield the chunks of the engine up to the first stop text. Errors name the fields of the
    caller's request.

    The engine's iterator is closed when the body ends, for whatever reason. Closing cancels the
    request and frees its memory.
    """
    hint = SCHEMA_HINT if schema_note(task, engine.capabilities) else ""
    chunks = engine.generate(request)
    if stop:
        chunks = until_stop(chunks, stop)
    try:
        with current().generating():
            async with naming(task.grammar_field, task.prompt_field, hint):
                yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def _collect(
    engine: Engine, request: GenerateRequest, task: Task, stop: Sequence[str], into: _Chunks
) -> None:
    async with _generating(engine, request, task, stop) as chunks:
        async for chunk in chunks:
            into.add(chunk)


async def _next(chunks: AsyncIterator[Chunk]) -> Chunk | None:
    async for chunk in chunks:
        return chunk
    return None


@dataclass(slots=True)
class _Chunks:
    """The chunks of one answer. check: finds violations before the end of the answer."""

    check: PrefixCheck | None = None
    parts: list[str] = field(default_factory=list)
    last: Chunk | None = None
    record: CallRecord = field(default_factory=current)
    begun: float = field(default_factory=time.perf_counter)

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk. Raises ``OutputInvalid`` for a violation that no further text can mend, so that
        generation ends."""
        self.record.generated(chunk)
        self.parts.append(chunk.text)
        self.last = chunk
        if self.check is None or chunk.finish_reason is not None:
            return
        violation = self.check.feed(chunk.text)
        if violation is not None:
            self.record.ended_early(chunk)
            self.log_output("invalid")
            raise invalid(
                "does not fit the schema",
                violation.pointer,
                violation.keyword,
                after_tokens=chunk.usage.output_tokens,
            )

    def spent(self) -> Chunk:
        """The last chunk, with the time of the attempt also where its generation was ended early."""
        last = self.last or Chunk("")
        if last.finish_reason is not None:
            return last
        return replace(last, timings=Timings(total_s=time.perf_counter() - self.begun))

    def log_output(self, finish_reason: str) -> None:
        """Write the text to the log, where the operator allows it and the caller asks for it."""
        if self.record.log_output:
            text = "".join(self.parts)
            output_log.debug("output %s", pairs(finish_reason=finish_reason, text=text))

    def ended(self) -> Chunk:
        """The chunk with the finish reason."""
        if self.last is None or self.last.finish_reason is None:
            raise InternalError("The engine ended without a finish reason.")
        return self.last


async def _finish(
    task: Task,
    collected: _Chunks,
    sampling: Sampling,
    capabilities: Capabilities,
    accept_empty: bool,
    accept_cut: bool,
    limits: SchemaLimits,
) -> Answer:
    """Check that the generated text is complete, then parse and validate it. Parsing that takes
    time runs outside the event loop."""
    last = collected.ended()
    assert last.finish_reason is not None
    collected.log_output(last.finish_reason.value)
    free = takes_any_text(task)
    if last.finish_reason in CUT and not (accept_cut and free):
        raise _truncated(last, sampling, capabilities.context_length)
    text = "".join(collected.parts)
    complete = last.finish_reason is FinishReason.STOP
    if complete and task.grammar is None and not text.strip():  # a grammar may allow blanks
        raise OutputInvalid("The model's answer is empty.", metadata={"keyword": "empty"})
    with collected.record.validating():
        value, as_json = (text, None) if free else await _read(task, text, accept_empty, limits)
    return Answer(
        text=text,
        value=value,
        usage=last.usage,
        finish_reason=last.finish_reason,
        timings=last.timings,
        json=as_json,
        model=capabilities.model,
        report=task.report,
    )


def _truncated(last: Chunk, sampling: Sampling, context_length: int) -> OutputTruncated:
    reason, tokens = last.finish_reason, last.usage.output_tokens
    room = context_length - last.usage.prompt_tokens if context_length else DEFAULT_MAX_TOKENS
    limit = sampling.answer_limit(room)
    if reason is FinishReason.LOOP:
        why = f"it began to repeat itself and was stopped after {tokens} tokens; change the prompt"
    elif sampling.max_tokens is None and limit < DEFAULT_MAX_TOKENS:
        why = (
            f"it needs more than the {limit} tokens that the prompt leaves of the context; "
            "shorten the text or send fewer or smaller images"
        )
    else:
        why = f"it needs more than {tokens} tokens; raise max_tokens"
    return OutputTruncated(
        f"The answer is not complete: {why}.",
        metadata={
            "finish_reason": reason.value if reason else "",
            "output_tokens": str(tokens),
            "max_tokens": str(limit),
            "prompt_tokens": str(last.usage.prompt_tokens),
            "image_tokens": str(last.usage.image_tokens),
        },
    )


async def _read(
    task: Task, text: str, accept_empty: bool, limits: SchemaLimits
) -> tuple[Any, str | None]:
    """See `read_answer`. A short answer under a schema that is known is validated here, within a small
    limit: to wake a thread and wait for it takes as long as the work. Everything else runs in a thread."""
    grammar = task.grammar
    if (
        len(text) <= INLINE_CHARACTERS
        and task.parse is task.usable is task.document is None
        and grammar is not None
        and grammar.kind is GrammarKind.JSON_SCHEMA
        and is_known(grammar.source, limits)
    ):
        with suppress(NotInTime):
            return read_answer(task, text, accept_empty, limits, INLINE_S, INLINE_STEPS)
    return await asyncio.to_thread(read_answer, task, text, accept_empty, limits)


def read_answer(
    task: Task,
    text: str,
    accept_empty: bool = False,
    limits: SchemaLimits = DEFAULT_LIMITS,
    seconds: float = DEFAULT_SECONDS,
    steps: int = DEFAULT_STEPS,
) -> tuple[Any, str | None]:
    """Parse and validate a complete answer. Returns its value, and its JSON text if the task
    answers in JSON. In that text, no name comes twice in an object: the last one counts.
    seconds, steps: limits of the validation against a schema, see `AnswerValidator`."""
    grammar = task.grammar
    is_json = grammar is not None and grammar.kind is GrammarKind.JSON_SCHEMA
    parser = task.parse or (parse_json if is_json else str)
    value = parser(text)
    if task.usable is not None and not accept_empty and not task.usable(value):
        raise NoUsableFields(
            "The answer has no usable information about the images; "
            "set accept_empty to accept such answers."
        )
    written: str | None = None
    if task.document is not None:
        written = json.dumps(task.document(value), ensure_ascii=False)
    if grammar is not None and is_json:
        document = text if written is None else written
        written = AnswerValidator(grammar.source, limits, seconds, steps).check(document)
    elif grammar is not None:
        check_answer(grammar, text, limits)
    return value, written
