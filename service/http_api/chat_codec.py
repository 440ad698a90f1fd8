"""The body of POST /v1/chat/completions -> a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from service.errors import InvalidRequest
from service.http_api import codec
from service.http_api.codec import Asked, Constraint, Conversation, Function, Named
from service.http_api.fields import ImageSource
from service.http_api.models import (
    AssistantMessage,
    ChatRequest,
    ImagePart,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    SystemMessage,
    TextPart,
    UserMessage,
)
from service.http_api.payloads import Payloads
from service.http_api.reading import read_json, read_model
from service.inference.calls import Call, InlineTask
from service.quotas import ANONYMOUS, Caller
from service.settings import Settings
from service.types import EncodedImage, Grammar, Sampling

TASK_NAME_LIMIT = 128
FIELDS = {
    "sampling": "",
    "images": "messages",
    "task": "messages",
    "task.name": "task",
    "task.inline": "",
}
"""Paths of errors of the inference layer -> the fields of a request that they are about."""


def decode_chat(payloads: Payloads, limits: Settings, caller: Caller = ANONYMOUS) -> Asked:
    """See ``codec.decoded``."""
    return codec.decoded(payloads, partial(_decode, limits=limits, caller=caller))


def _decode(payloads: Payloads, limits: Settings, caller: Caller) -> Asked:
    request = read_model(ChatRequest, read_json(payloads.lean))
    fields = dict(FIELDS)
    forced = _forced_tool(request)
    grammar = codec.grammar_of(request, _format(request), forced, fields)
    shown = codec.schema_in_prompt(grammar, request.schema_in_prompt)
    conversation = Conversation("messages", limits, payloads)
    task: str | InlineTask
    if request.task is not None:
        task, images = _registered(request, grammar, conversation)
    else:
        _converse(request, conversation)
        messages, images = conversation.whole()
        task = InlineTask("", "", grammar, messages, schema_in_prompt=shown)
    stream = bool(request.stream)
    codec.check_stream_options(request.stream_options, stream=stream)
    call = Call(
        task,
        images,
        _sampling(request, fields),
        accept_empty=bool(request.accept_empty),
        strict=bool(request.require_enforced),
        caller=caller,
        accept_cut=True,
        stop=_stops(request.stop),
    )
    return Asked(
        request.model,
        call,
        stream,
        bool(request.stream_options and request.stream_options.include_usage),
        None if forced is None else forced.name,
        fields,
        remote=conversation.remote,
    )


def _converse(request: ChatRequest, conversation: Conversation) -> None:
    for index, message in enumerate(request.messages):
        path = f"messages[{index}]"
        if isinstance(message, SystemMessage):
            conversation.system(_texts(message.content), message.role, path)
        elif isinstance(message, UserMessage):
            conversation.user(_parts(message.content), path)
        elif isinstance(message, AssistantMessage):
            _assistant(message, path, conversation)
        else:
            conversation.tool_result(
                _parts(message.content),
                message.tool_call_id,
                path,
                content="content",
                key="tool_call_id",
            )


def _assistant(message: AssistantMessage, path: str, conversation: Conversation) -> None:
    calls = message.tool_calls or ()
    if message.content is None and not calls:
        raise InvalidRequest(f"{path}.content", "is required where no tool is called")
    conversation.assistant(_texts(message.content), path)
    for index, call in enumerate(calls):
        function = call.function
        where = f"{path}.tool_calls[{index}].function.arguments"
        conversation.tool_call(call.id, function.name, function.arguments, where)


def _texts(content: str | Sequence[TextPart] | None) -> list[str]:
    if content is None:
        return []
    return [content] if isinstance(content, str) else [part.text for part in content]


def _parts(content: str | Sequence[TextPart | ImagePart]) -> list[str | ImageSource]:
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part.source for part in content]


def _registered(
    request: ChatRequest, grammar: Grammar | None, conversation: Conversation
) -> tuple[str, tuple[EncodedImage, ...]]:
    """The name of a registered task, and the images of the one message that stands beside it."""
    name = request.task
    assert name is not None
    if not name or len(name) > TASK_NAME_LIMIT:
        raise InvalidRequest("task", f"must be a name of 1 to {TASK_NAME_LIMIT} characters")
    for other in ("response_format", "structured_outputs", "tools", "tool_choice"):
        given = getattr(request, other)
        if given is not None and not (other == "response_format" and grammar is None):
            raise InvalidRequest(other, "must be left out beside task; the task brings its grammar")
    message = request.messages[0]
    if len(request.messages) > 1 or not isinstance(message, UserMessage):
        raise InvalidRequest(
            "messages", "beside task there is one message, of the user, with the images alone"
        )
    parts = _parts(message.content)
    conversation.user(parts, "messages[0]")
    for index, part in enumerate(parts):
        if isinstance(part, str) and part.strip():
            place = "" if isinstance(message.content, str) else f"[{index}]"
            raise InvalidRequest(
                f"messages[0].content{place}",
                "must have no text beside task; the task brings its prompt",
            )
    return name, conversation.images()


def _format(request: ChatRequest) -> Constraint | None:
    chosen = request.response_format
    if isinstance(chosen, JsonObjectFormat):
        return codec.any_object("response_format")
    if isinstance(chosen, JsonSchemaFormat):
        path = "response_format.json_schema.schema"
        return codec.of_schema(chosen.json_schema.schema_, "response_format", path)
    return None


def _forced_tool(request: ChatRequest) -> Function | None:
    choice = request.tool_choice
    return codec.forced_tool(
        [
            Function(tool.function.name, tool.function.parameters, f"tools[{index}].function")
            for index, tool in enumerate(request.tools or [])
        ],
        Named(choice.function.name, "tool_choice.function.name")
        if isinstance(choice, NamedTool)
        else choice,
        schema="response_format with the type json_schema",
        by_name='{"type": "function", "function": {"name": …}}',
    )


def _sampling(request: ChatRequest, fields: dict[str, str]) -> Sampling:
    newer, older = request.max_completion_tokens, request.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidRequest(
            "max_tokens", f"is {older}, but max_completion_tokens is {newer}; send one of them"
        )
    if newer is None and older is not None:
        return codec.sampling(request, older, "max_tokens", fields)
    return codec.sampling(request, newer, "max_completion_tokens", fields)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
