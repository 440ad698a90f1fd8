"""The request of a run: what a single call over gRPC would ask for each image."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from service.batch.engine import Work
from service.batch.errors import BatchError
from service.batch.outputs import AnswerColumns
from service.errors import ServiceError
from service.grpc_api.codec import decode_run
from service.inference.calls import ANALYZE_TASK, Call, InlineTask
from service.inference.pipeline import schema_limits
from service.inference.request_checks import takes_any_text
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.settings import Settings
from service.structured_output.analyser import in_thread
from service.tasks.contract import Task
from service.tasks.inline import InlinePrompt, inline_task
from service.tasks.registry import TaskSourceError
from service.types import GrammarKind, PropertyOrder
from service.wiring import build_registry

ANSWER_SETTINGS = (
    "engine", "model", "revision", "dtype", "backend", "deepstack", "model_format", "cache_type", "image_pixels",
    "context_length", "vision", "max_images", "max_image_bytes", "max_image_pixels", "max_request_pixels",
    "image_formats", "image_background", "jpeg_scaled_pixels", "property_order", "close_objects", "output_retries",
    "schema_in_prompt",
)  # fmt: skip
"""Settings that change answers, or which images are accepted. Those of speed are not among them: a run may
go on with others."""


def read_request(
    *,
    task: str | None,
    prompt: str | None,
    schema: str | None,
    sampling: Mapping[str, Any],
) -> pb.RunTaskRequest:
    """The request without an image. Raises ``BatchError``."""
    if (task is None) == (prompt is None):
        raise BatchError("give either a prompt or the name of a task")
    if task is not None and schema is not None:
        raise BatchError("a registered task has its own schema")
    try:
        options = pb.SamplingOptions(**sampling)
    except (TypeError, ValueError) as error:
        raise BatchError(f"sampling: {error}") from None
    if task is not None:
        return pb.RunTaskRequest(task=pb.Task(name=task), sampling=options)
    grammar = None if schema is None else pb.Grammar(json_schema=schema)
    inline = pb.InlineTask(user=prompt or "", grammar=grammar)
    return pb.RunTaskRequest(task=pb.Task(inline=inline), sampling=options)


def work_of(request: pb.RunTaskRequest, settings: Settings, accept_empty: bool = False) -> Work:
    """What is done with every row. The task is checked as by a server.

    Raises ``BatchError`` for a request that would fail for every image.
    """
    with_image = pb.RunTaskRequest()
    with_image.CopyFrom(request)
    image = pb.Image(data=b"the image of the row")
    messages = with_image.task.inline.messages
    if messages:  # after the examples comes the question, with the image before its text
        messages[-1].parts.insert(0, pb.Part(image=image))
    else:
        with_image.images.append(image)
    try:
        call = replace(decode_run(with_image, settings), accept_empty=accept_empty)
        task = asyncio.run(_task(call, settings))
    except ServiceError as error:
        raise BatchError(f"{error.reason}: {error.message}") from None
    except TaskSourceError as error:
        raise BatchError(str(error)) from None
    is_json = task.document is not None or (
        task.grammar is not None and task.grammar.kind is GrammarKind.JSON_SCHEMA
    )
    return Work(
        call, AnswerColumns(is_json and not takes_any_text(task), task.name == ANALYZE_TASK)
    )


async def _task(call: Call, settings: Settings) -> Task:
    registry = build_registry(settings)
    if isinstance(call.task, str):
        return registry.get(call.task)
    inline, order = call.task, PropertyOrder(settings.property_order)
    grammar = inline.grammar and inline.grammar.with_defaults(
        order, settings.close_objects, lengths_beside=True
    )
    return await inline_task(
        InlinePrompt(
            inline.system, inline.user, inline.messages, inline.tools, inline.schema_in_prompt
        ),
        grammar,
        in_thread,
        schema_limits(settings),
        max_text_bytes=settings.max_text_bytes,
    )


def record_of(work: Work, settings: Settings) -> dict[str, Any]:
    """The part of the plan that tells this request from another one."""
    call = work.call
    shown = hashlib.sha256()
    for image in call.images[:-1]:
        shown.update(hashlib.sha256(image.data).digest())
    engine = settings.engine_settings
    chosen = {name: getattr(settings, name, None) for name in ANSWER_SETTINGS}
    chosen |= {name: getattr(engine, name) for name in ANSWER_SETTINGS if hasattr(engine, name)}
    return {
        "task": _described(asyncio.run(_task(call, settings)), call),
        "example_images_sha256": shown.hexdigest() if len(call.images) > 1 else None,
        "sampling": asdict(call.sampling),
        "strict": call.strict,
        "accept_empty": call.accept_empty,
        **{f"setting {name}": value for name, value in chosen.items()},
    }


def _described(task: Task, call: Call) -> dict[str, Any]:
    grammar = task.grammar
    content = {
        "name": None if isinstance(call.task, InlineTask) else task.name,
        "system": task.system,
        "user": task.user,
        "grammar": None if grammar is None else [grammar.kind.value, grammar.source],
        "schema_in_prompt": task.schema_in_prompt,
        "order": grammar.property_order.value if grammar and grammar.property_order else None,
    }
    messages = [repr(one) for one in (*task.messages, *task.examples)]
    if messages:
        content["messages_sha256"] = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    return content
