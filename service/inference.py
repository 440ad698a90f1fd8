"""From a decoded call to its answer: a place in the queue, safe pictures, the task, the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from service.admission import Admission
from service.calls import Answer, Call, InlineTask
from service.engine import Engine
from service.errors import InferenceTimeout, InvalidRequest
from service.images import ImageLimits, decode_images
from service.settings import Settings
from service.tasks.contract import Task, TaskResult
from service.tasks.inline import inline_task
from service.tasks.registry import Registry
from service.tasks.runner import run, stream
from service.types import Image


class Inference:
    """Runs calls on one engine, within the limits of the settings."""

    def __init__(self, engine: Engine, registry: Registry, settings: Settings) -> None:
        self._engine = engine
        self._registry = registry
        self._settings = settings
        self._image_limits = ImageLimits(
            max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels
        )
        self.admission = Admission(settings.max_concurrent, settings.max_queue)

    async def answer(self, call: Call, time_left_s: float | None) -> tuple[Any, Answer]:
        """The value of the task's parser, and the answer."""
        task = self._task(call)
        deadline = self._deadline(time_left_s)
        async with self.admission.slot(deadline):
            images = await self._images(call)
            result = await run(
                self._engine,
                task,
                images,
                call.sampling,
                timeout_s=remaining(deadline),
                accept_empty=call.accept_empty,
            )
            return result.value, self._answer(result)

    async def events(
        self, call: Call, time_left_s: float | None
    ) -> AsyncGenerator[str | Answer, None]:
        """Pieces of the text, then the complete answer."""
        task = self._task(call)
        deadline = self._deadline(time_left_s)
        async with self.admission.slot(deadline):
            images = await self._images(call)
            events = stream(
                self._engine, task, images, call.sampling, timeout_s=remaining(deadline)
            )
            async with aclosing(events) as open_events:
                async for event in open_events:
                    yield event if isinstance(event, str) else self._answer(event)

    def _task(self, call: Call) -> Task:
        """The task, registered or inline; refuses a call without the picture that it needs."""
        if isinstance(call.task, InlineTask):
            return inline_task(call.task.system, call.task.user, call.task.grammar, self._settings)
        task = self._registry.get(call.task)
        if task.needs_image and not call.images:
            raise InvalidRequest(
                "images", "this task needs at least one picture", reason="IMAGE_MISSING"
            )
        return task

    def _deadline(self, time_left_s: float | None) -> float:
        """When the call has to be over, by the event loop's clock."""
        limit_s = self._settings.inference_timeout_s
        budget_s = limit_s if time_left_s is None else min(limit_s, time_left_s)
        if budget_s <= 0:
            raise InferenceTimeout("The deadline of the call had passed before the work began.")
        return asyncio.get_running_loop().time() + budget_s

    async def _images(self, call: Call) -> list[Image]:
        if not call.images:
            return []
        pixels = await decode_images(
            [(image.field, image.data) for image in call.images], self._image_limits
        )
        return [
            Image(array, image.min_pixels, image.max_pixels)
            for array, image in zip(pixels, call.images, strict=True)
        ]

    def _answer(self, result: TaskResult) -> Answer:
        return Answer(
            text=result.text,
            json=result.json,
            finish_reason=result.finish_reason,
            usage=result.usage,
            timings=result.timings,
            model=self._engine.capabilities.model,
        )


def remaining(deadline: float) -> float:
    """Seconds until the deadline. Raises ``InferenceTimeout`` when there are none."""
    left_s = deadline - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise InferenceTimeout("The time was over before the engine could begin.")
    return left_s
