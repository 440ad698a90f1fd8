"""Runs a decoded call: finds its task, checks the headers of its images, waits for memory and a slot,
calls the engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from service.deadlines import Deadline
from service.engine import Engine
from service.errors import EngineUnavailable, InferenceTimeout
from service.inference.budgets import Budgets
from service.inference.calls import Answer, Call, InlineTask, Validation
from service.inference.decoding import RequestImage, emptied
from service.inference.request_checks import check_enforced, check_kind, on_engine
from service.inference.runner import run, stream
from service.logs import request_id
from service.observation import current
from service.quotas import ANONYMOUS, Caller, Use
from service.schema_compiler.limits import SchemaLimits
from service.schema_compiler.report import under
from service.settings import Settings
from service.structured_output.analyser import Analyser, in_thread
from service.structured_output.compilation import prepare
from service.tasks.contract import Task
from service.tasks.inline import InlinePrompt, inline_task
from service.tasks.registry import Registry
from service.types import DEFAULT_MAX_TOKENS, Capabilities, Grammar, PropertyOrder


class Inference:
    """Runs calls on one engine, within the limits of the settings.

    analyser: makes grammars that come with calls ready for the engine.
    budgets: budgets that are shared with other engines; by default a new set.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        settings: Settings,
        analyser: Analyser = in_thread,
        budgets: Budgets | None = None,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._settings = settings
        self._schema_limits = schema_limits(settings)
        self._defaults = PropertyOrder(settings.property_order), settings.close_objects
        self._analyser = analyser
        self.progress = 0
        """Counter that increases with every answer, and every chunk of an answer, from the
        engine."""
        self.active = 0
        """Calls that hold a slot for this engine."""
        self.refusal: tuple[str, str] | None = None
        """Reason and message of the error for all calls while the engine is unhealthy."""
        budgets = budgets or Budgets(settings)
        self._quotas = budgets.quotas
        self.decoder, self.encoded = budgets.decoder, budgets.encoded
        self.admission, self.large = budgets.admission, budgets.large
        self.waiting = budgets.waiting
        self.analyses, self.validations = budgets.analyses, budgets.validations

    @property
    def capabilities(self) -> Capabilities:
        """What the engine can do, with the operator's default for ``schema_in_prompt``. Valid once it
        has started."""
        wish = self._settings.schema_in_prompt
        found = self._engine.capabilities
        return found if wish is None else replace(found, schema_in_prompt=wish)

    async def answer(self, call: Call, time_left_s: float | None) -> Answer:
        """The answer, validated."""
        deadline = self._deadline(time_left_s)
        async with self._admitted(call, deadline) as (task, images, use):
            options = self._options(call, deadline)
            retries = self._settings.output_retries
            answer = await run(
                self._engine, task, images, call.sampling, **options, retries=retries
            )
            self.progress += 1
            use.spend_tokens(_tokens(answer))
        return answer

    async def events(
        self, call: Call, time_left_s: float | None
    ) -> AsyncGenerator[str | Answer, None]:
        """Yield the chunks of the text, then the complete answer."""
        deadline = self._deadline(time_left_s)
        async with self._admitted(call, deadline) as (task, images, use):
            options = self._options(call, deadline)
            events: Any = stream(self._engine, task, images, call.sampling, **options)
            async with aclosing(events) as open_events:
                async for event in open_events:
                    self.progress += 1
                    if isinstance(event, Answer):
                        use.spend_tokens(_tokens(event))
                    yield event

    async def validate(
        self, grammar: Grammar, time_left_s: float | None, caller: Caller = ANONYMOUS
    ) -> Validation:
        """Report which keywords of a grammar are enforced. The engine compiles the grammar, too.

        Raises the same ``GrammarError`` as a task with this grammar, on a field at or below
        ``grammar``.
        """
        deadline = self._deadline(time_left_s)
        field = f"grammar.{grammar.kind.value}"
        async with AsyncExitStack() as stack:
            stack.enter_context(self._quotas.use(caller, 0))
            await stack.enter_async_context(self.validations.slot(deadline, caller))
            asked = self._with_defaults(grammar)
            work = self._analyser(asked, self._schema_limits, caller.name)
            analysed = await deadline.wait(work, late)
            check_kind(grammar, self._engine.capabilities, field)
            begun = time.perf_counter()
            limit_s = self._settings.compile_timeout_s
            await deadline.wait(prepare(self._engine, analysed.grammar, field, limit_s), late)
        report = under(self.capabilities, analysed.report)
        return Validation(report, time.perf_counter() - begun)

    def _with_defaults(self, grammar: Grammar) -> Grammar:
        return grammar.with_defaults(*self._defaults, self._engine.capabilities.limits_lengths)

    async def _task(self, call: Call, deadline: Deadline) -> Task:
        """The task, registered or inline. Raises if ``strict`` refuses its grammar."""
        if isinstance(call.task, InlineTask):
            task = await self._inline(call.task, deadline, call.caller)
        else:
            task = self._registry.get(call.task)
            if task.schema_in_prompt is None:
                task = replace(task, schema_in_prompt=self.capabilities.schema_in_prompt)
        record = current()
        record.model = self._engine.capabilities.model
        record.task = "inline" if isinstance(call.task, InlineTask) else task.name
        if call.strict:
            check_enforced(on_engine(task, self.capabilities))
        return task

    async def _inline(self, inline: InlineTask, deadline: Deadline, caller: Caller) -> Task:
        shown = inline.schema_in_prompt
        if shown is None:
            shown = self.capabilities.schema_in_prompt
        async with self.analyses.slot(deadline, caller):
            work = inline_task(
                InlinePrompt(
                    inline.system,
                    inline.user,
                    inline.messages,
                    inline.tools,
                    shown,
                ),
                inline.grammar and self._with_defaults(inline.grammar),
                partial(self._analyser, caller=caller.name),
                self._schema_limits,
                max_text_bytes=self._settings.max_text_bytes,
            )
            if inline.grammar is None:  # nothing to wait for
                return await work
            with current().span("analyse grammar"):
                return await deadline.wait(work, late)

    @asynccontextmanager
    async def _admitted(
        self, call: Call, deadline: Deadline
    ) -> AsyncIterator[tuple[Task, list[RequestImage], Use]]:
        """Hold memory and a slot for a call. Yields (task, images, use).

        The example images of the task come first; ``use`` records what the call takes from the quota
        of its caller.

        The headers of the images are checked; nothing is decoded yet. The call waits for memory
        before it takes a slot. The bytes of the images are released when the body ends.
        """
        record = current()
        reserved = call.sampling.max_tokens or DEFAULT_MAX_TOKENS
        with emptied(call.images), self._quotas.use(call.caller, reserved, record.tokens) as use:
            task = await self._task(call, deadline)
            encoded = [*task.example_images, *call.images]
            caller = call.caller.name
            images: list[RequestImage] = []
            if encoded:
                with record.span("read image headers", images=len(encoded)):
                    images = await deadline.wait(self.decoder.open(encoded, caller), late)
            size = sum(len(image.data) for image in encoded)
            record.images, record.image_bytes = len(images), size
            record.pixels = sum(image.width * image.height for image in images)
            own = images[len(task.example_images) :]
            use.spend_pixels(sum(image.file_pixels for image in own))
            async with AsyncExitStack() as stack:
                with record.queueing(), self.waiting:
                    if images:
                        await stack.enter_async_context(self.encoded.hold(size, deadline, caller))
                    if any(image.large for image in images):
                        await stack.enter_async_context(self.large.slot(deadline, call.caller))
                    await stack.enter_async_context(self.admission.slot(deadline, call.caller))
                self.active += 1
                try:
                    yield task, images, use
                finally:
                    self.active -= 1

    def _options(self, call: Call, deadline: Deadline) -> dict[str, Any]:
        """The options of a run and of a stream."""
        return {
            "timeout_s": left_for_engine(deadline),
            "request_id": request_id.get(),
            "accept_empty": call.accept_empty,
            "accept_cut": call.accept_cut,
            "strict": call.strict,
            "stop": call.stop,
            "limits": self._schema_limits,
            "compile_timeout_s": self._settings.compile_timeout_s,
        }

    def _deadline(self, time_left_s: float | None) -> Deadline:
        """The deadline of a call: that of the caller or of the server, whichever is earlier.

        Raises ``EngineUnavailable`` while the engine is unhealthy.
        """
        if self.refusal is not None:
            reason, message = self.refusal
            raise EngineUnavailable(message, reason=reason)
        limit_s = self._settings.inference_timeout_s
        budget_s = limit_s if time_left_s is None else min(limit_s, time_left_s)
        if budget_s <= 0:
            raise InferenceTimeout(
                "The deadline passed before the server started to work on the call."
            )
        return Deadline(budget_s)


def _tokens(answer: Answer) -> int:
    return answer.usage.prompt_tokens + answer.usage.output_tokens


def schema_limits(settings: Settings) -> SchemaLimits:
    """Size limits of grammars, for callers and for task files alike."""
    return SchemaLimits(
        max_bytes=settings.max_schema_bytes,
        max_depth=settings.max_schema_depth,
        max_regex_length=settings.max_regex_length,
    )


def left_for_engine(deadline: Deadline) -> float:
    """Seconds until the deadline. Raises ``InferenceTimeout`` after it."""
    left_s = deadline.left_s
    if left_s <= 0:
        raise late()
    return left_s


def late() -> InferenceTimeout:
    """The error of a call whose deadline passed before the engine started it."""
    return InferenceTimeout("The deadline passed before the engine could start.")
