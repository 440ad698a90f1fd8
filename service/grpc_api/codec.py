"""Converts between proto messages and plain values. Pure functions; checks every field of a
request.

An invalid field raises ``InvalidRequest`` with its path in the caller's request
(``sampling.top_p``, ``images[2].min_pixels``).
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from service import __version__
from service.errors import InvalidRequest
from service.grpc_api.conversation_codec import decode_messages, decode_tools
from service.grpc_api.grammar_codec import (
    GRAMMAR_KINDS,
    OF_SCHEMAS,
    decode_grammar,
    encode_grammar,
    encode_report,
    encode_warnings,
)
from service.grpc_api.image_codec import decode_images
from service.inference.calls import (
    ANALYZE_TASK,
    Answer,
    Call,
    InlineTask,
    TaskDescription,
)
from service.inference.sampling import refuse, violations
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.quotas import ANONYMOUS, Caller
from service.settings import Settings
from service.types import (
    Capabilities,
    EncodedImage,
    Enforcer,
    FinishReason,
    Grammar,
    Modality,
    Sampling,
    Timings,
    Usage,
)

TASK_NAME_LIMIT = 128
UINT32_MAX = 2**32 - 1
MODALITIES = {Modality.TEXT: pb.MODALITY_TEXT, Modality.IMAGE: pb.MODALITY_IMAGE}
ENFORCERS = {
    Enforcer.MASK: pb.ENFORCER_MASK,
    Enforcer.VALIDATION: pb.ENFORCER_VALIDATION,
}


# Requests


def decode_analyze(
    request: pb.AnalyzeImageRequest, limits: Settings, caller: Caller = ANONYMOUS
) -> Call:
    """AnalyzeImageRequest -> Call of the built-in task that describes a scene."""
    refuse_unknown_fields(request)
    images = decode_images(request.images, limits.max_images)
    sampling = decode_sampling(request.sampling)
    return Call(ANALYZE_TASK, images, sampling, request.accept_empty, caller=caller)


def decode_run(
    request: pb.RunTaskRequest | pb.StreamTaskRequest, limits: Settings, caller: Caller = ANONYMOUS
) -> Call:
    """RunTaskRequest or StreamTaskRequest -> Call."""
    refuse_unknown_fields(request)
    task, shown = decode_task(request.task, limits.max_images)
    images = decode_images(request.images, limits.max_images)
    if isinstance(task, InlineTask) and task.messages and images:
        raise InvalidRequest(
            "images", "must be empty beside task.inline.messages; put each image into its message"
        )
    sampling = decode_sampling(request.sampling)
    return Call(task, images or shown, sampling, strict=request.strict, caller=caller)


def decode_validate(request: pb.ValidateSchemaRequest) -> Grammar:
    """ValidateSchemaRequest -> Grammar."""
    refuse_unknown_fields(request)
    return decode_grammar(request.grammar, "grammar")


def decode_task_name(name: str, field: str) -> str:
    """Check the name of a task: not empty and not too long."""
    if not name:
        raise InvalidRequest(field, "is required: the name of a registered task")
    if len(name) > TASK_NAME_LIMIT:
        raise InvalidRequest(field, f"is longer than {TASK_NAME_LIMIT} characters")
    return name


def decode_task(
    task: pb.Task, max_images: int
) -> tuple[str | InlineTask, tuple[EncodedImage, ...]]:
    """The name of a registered task, or an inline task with the images of its messages.

    The texts of an inline task are checked later.
    """
    kind = task.WhichOneof("source")
    if kind is None:
        raise InvalidRequest("task", "is required: the name of a registered task, or an inline one")
    if kind == "name":
        return decode_task_name(task.name, "task.name"), ()
    inline = task.inline
    given = inline.HasField("grammar")
    grammar = decode_grammar(inline.grammar, "task.inline.grammar") if given else None
    tools = decode_tools(inline.tools, "task.inline.tools")
    shown = _decode_schema_in_prompt(inline)
    if not inline.messages:
        found = InlineTask(inline.system, inline.user, grammar, (), tools, shown)
        return found, ()
    for name in ("system", "user"):
        if getattr(inline, name):
            raise InvalidRequest(
                f"task.inline.{name}", "must be empty beside task.inline.messages; it is a message"
            )
    messages, images = decode_messages(inline.messages, "task.inline.messages", max_images)
    return InlineTask("", "", grammar, messages, tools, shown), images


def _decode_schema_in_prompt(inline: pb.InlineTask) -> bool | None:
    """InlineTask.schema_in_prompt -> bool; None for a caller that does not set it."""
    if not inline.HasField("schema_in_prompt"):
        return None
    if not inline.grammar.HasField("json_schema"):
        raise InvalidRequest("task.inline.schema_in_prompt", OF_SCHEMAS)
    return inline.schema_in_prompt


def decode_sampling(message: pb.SamplingOptions) -> Sampling:
    """SamplingOptions -> Sampling. One error names all invalid options.

    An option that was sent is checked even if its value equals the default of an absent option: a
    ``top_k`` of 0 is refused.
    """
    given = {field.name: value for field, value in message.ListFields()}
    if not given:
        return GREEDY
    refuse(tuple(violations(given)))
    return Sampling(**given)


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raise ``InvalidRequest`` for a field that this server does not know.

    Proto3 would ignore the field, and a newer client would not notice that its option has no
    effect.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequest(
            path or "request",
            f"has the field number {unknown[0].field_number}, which this server does not know",
            reason="UNKNOWN_FIELD",
        )
    for name, repeated in nested_fields(message.DESCRIPTOR):
        inner = f"{path}.{name}" if path else name
        if repeated:
            for index, item in enumerate(getattr(message, name)):
                refuse_unknown_fields(item, f"{inner}[{index}]")
        elif message.HasField(name):
            refuse_unknown_fields(getattr(message, name), inner)


@cache
def nested_fields(message: Descriptor) -> tuple[tuple[str, bool], ...]:
    """The fields of a message type whose values are messages, and whether they are repeated."""
    return tuple(
        (field.name, field.is_repeated)
        for field in message.fields
        if field.message_type is not None
    )


GREEDY = Sampling()


# Responses


def encode_analysis(answer: Answer) -> pb.AnalyzeImageResponse:
    """Answer of ANALYZE_TASK, whose value is a dataclass of nine fields -> AnalyzeImageResponse."""
    return pb.AnalyzeImageResponse(
        analysis=pb.ImageAnalysis(**asdict(answer.value)),
        usage=encode_usage(answer.usage),
        finish_reason=encode_finish_reason(answer.finish_reason),
        model=answer.model,
        timings=encode_timings(answer.timings),
    )


def encode_result(answer: Answer) -> pb.TaskResult:
    """Answer -> TaskResult."""
    enforcement, checked, omitted = encode_report(answer.report)
    return pb.TaskResult(
        text=answer.text,
        json=answer.json,
        usage=encode_usage(answer.usage),
        finish_reason=encode_finish_reason(answer.finish_reason),
        model=answer.model,
        timings=encode_timings(answer.timings),
        enforcement=enforcement,
        checked=checked,
        checked_omitted=omitted,
        attempts=answer.attempts,
        warnings=encode_warnings(answer.report),
    )


def encode_event(event: str | Answer) -> pb.StreamTaskResponse:
    """A chunk of text, or the complete answer -> one message of the stream."""
    if isinstance(event, str):
        return pb.StreamTaskResponse(delta=event)
    return pb.StreamTaskResponse(result=encode_result(event))


def encode_finish_reason(reason: FinishReason) -> pb.FinishReason.ValueType:
    """Only STOP: whatever else ends an answer is an error before it comes here."""
    assert reason is FinishReason.STOP
    return pb.FINISH_REASON_STOP


def encode_usage(usage: Usage) -> pb.Usage:
    """Usage -> Usage."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        image_tokens=usage.image_tokens,
        output_tokens=usage.output_tokens,
    )


def encode_timings(timings: Timings) -> pb.Timings:
    """Timings -> Timings, in seconds."""
    return pb.Timings(
        queue_seconds=timings.queue_s,
        first_token_seconds=timings.first_token_s,
        total_seconds=timings.total_s,
    )


def encode_task(task: TaskDescription) -> pb.TaskInfo:
    """TaskDescription -> TaskInfo."""
    grammar = encode_grammar(task.grammar) if task.grammar is not None else None
    enforcement, checked, omitted = encode_report(task.report)
    return pb.TaskInfo(
        name=task.name,
        description=task.description,
        needs_image=task.needs_image,
        grammar=grammar,
        enforcement=enforcement,
        checked=checked,
        checked_omitted=omitted,
        warnings=encode_warnings(task.report),
    )


def encode_model(capabilities: Capabilities, limits: Settings) -> pb.GetModelResponse:
    """The capabilities of the engine and the limits of the operator -> GetModelResponse."""
    return pb.GetModelResponse(
        name=capabilities.model,
        engine=capabilities.engine,
        capabilities=encode_capabilities(capabilities),
        limits=encode_limits(limits),
        details=dict(capabilities.details),
        server_version=__version__,
    )


def encode_model_info(capabilities: Capabilities, serving: bool) -> pb.ModelInfo:
    """The capabilities of an engine, and whether it takes calls -> ModelInfo."""
    return pb.ModelInfo(
        name=capabilities.model,
        engine=capabilities.engine,
        capabilities=encode_capabilities(capabilities),
        serving=serving,
    )


def encode_capabilities(capabilities: Capabilities) -> pb.Capabilities:
    """Capabilities -> Capabilities."""
    return pb.Capabilities(
        vision=Modality.IMAGE in capabilities.modalities,
        grammar_kinds=sorted(GRAMMAR_KINDS[kind] for kind in capabilities.grammar_kinds),
        sampling_options=sorted(capabilities.sampling_options),
        context_length=capabilities.context_length,
        max_images=min(capabilities.max_images, UINT32_MAX),
        modalities=sorted(MODALITIES[one] for one in capabilities.modalities),
        enforcer=ENFORCERS[capabilities.enforcer],
        schema_in_prompt=capabilities.schema_in_prompt,
    )


def encode_limits(limits: Settings) -> pb.Limits:
    """The settings that limit a request -> Limits."""
    return pb.Limits(
        max_message_bytes=limits.max_message_bytes,
        max_images=limits.max_images,
        max_image_bytes=limits.max_image_bytes,
        max_image_pixels=limits.max_image_pixels,
        max_request_pixels=limits.max_request_pixels,
        max_text_bytes=limits.max_text_bytes,
        max_schema_bytes=limits.max_schema_bytes,
        max_schema_depth=limits.max_schema_depth,
        max_regex_length=limits.max_regex_length,
        compile_timeout_seconds=limits.compile_timeout_s,
        inference_timeout_seconds=limits.inference_timeout_s,
        output_retries=limits.output_retries,
    )
