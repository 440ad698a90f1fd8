"""The body of POST /v1/responses -> a call: the same conversation as that of a chat completion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from service.errors import InvalidRequest
from service.http_api import codec
from service.http_api.codec import Asked, Constraint, Conversation, Function, Named
from service.http_api.fields import ImageSource
from service.http_api.models import JsonObjectFormat
from service.http_api.payloads import Payloads
from service.http_api.reading import read_json, read_model
from service.http_api.responses_models import (
    AssistantItem,
    FunctionCallItem,
    InputImage,
    InputText,
    InstructionItem,
    NamedFunction,
    OutputText,
    ResponsesRequest,
    SchemaFormat,
    UserItem,
)
from service.inference.calls import Call, InlineTask
from service.quotas import ANONYMOUS, Caller
from service.schema_compiler.exact import text_of
from service.settings import Settings

FIELDS = {
    "sampling": "",
    "images": "input",
    "task": "input",
    "task.inline": "",
    "task.inline.messages": "input",
}
"""Paths of errors of the inference layer -> the fields of a request that they are about."""


def decode_responses(payloads: Payloads, limits: Settings, caller: Caller = ANONYMOUS) -> Asked:
    """See ``codec.decoded``."""
    return codec.decoded(payloads, partial(_decode, limits=limits, caller=caller))


def _decode(payloads: Payloads, limits: Settings, caller: Caller) -> Asked:
    request = read_model(ResponsesRequest, read_json(payloads.lean))
    fields = dict(FIELDS)
    forced = _forced_tool(request)
    grammar = codec.grammar_of(request, _format(request), forced, fields)
    shown = codec.schema_in_prompt(grammar, request.schema_in_prompt)
    conversation = Conversation("input", limits, payloads)
    _converse(request, conversation)
    messages, images = conversation.whole()
    stream = bool(request.stream)
    codec.check_stream_options(request.stream_options, stream=stream)
    call = Call(
        InlineTask("", "", grammar, messages, schema_in_prompt=shown),
        images,
        codec.sampling(request, request.max_output_tokens, "max_output_tokens", fields),
        strict=bool(request.require_enforced),
        caller=caller,
        accept_cut=True,
    )
    tool = None if forced is None else forced.name
    echo = text_of(_echo(request)).encode()
    remote = conversation.remote
    return Asked(request.model, call, stream, False, tool, fields, echo, remote)


def _converse(request: ResponsesRequest, conversation: Conversation) -> None:
    if request.instructions is not None:
        conversation.system([request.instructions], "system", "instructions")
    if isinstance(request.input, str):
        conversation.user([request.input], "input")
        return
    for index, item in enumerate(request.input):
        path = f"input[{index}]"
        if isinstance(item, InstructionItem):
            if request.instructions is not None:
                raise InvalidRequest(
                    f"{path}.role", f"must not be {item.role} beside instructions; send one of them"
                )
            conversation.system(_texts(item.content), item.role, path)
        elif isinstance(item, UserItem):
            conversation.user(_parts(item.content), path)
        elif isinstance(item, AssistantItem):
            conversation.assistant(_texts(item.content), path)
        elif isinstance(item, FunctionCallItem):
            conversation.tool_call(item.call_id, item.name, item.arguments, f"{path}.arguments")
        else:
            conversation.tool_result(
                _parts(item.output), item.call_id, path, content="output", key="call_id"
            )


def _texts(content: str | Sequence[InputText | OutputText]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _parts(content: str | Sequence[InputText | InputImage]) -> list[str | ImageSource]:
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, InputText) else part.source for part in content]


def _format(request: ResponsesRequest) -> Constraint | None:
    chosen = request.text and request.text.format
    if isinstance(chosen, JsonObjectFormat):
        return codec.any_object("text.format")
    if isinstance(chosen, SchemaFormat):
        return codec.of_schema(chosen.schema_, "text.format", "text.format.schema")
    return None


def _forced_tool(request: ResponsesRequest) -> Function | None:
    choice = request.tool_choice
    return codec.forced_tool(
        [
            Function(tool.name, tool.parameters, f"tools[{index}]")
            for index, tool in enumerate(request.tools or [])
        ],
        Named(choice.name, "tool_choice.name") if isinstance(choice, NamedFunction) else choice,
        schema="text.format with the type json_schema",
        by_name='{"type": "function", "name": …}',
    )


def _echo(request: ResponsesRequest) -> dict[str, Any]:
    """The fields of a request that an answer repeats, with the values that were used."""
    form = request.text and request.text.format
    choice = request.tool_choice
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": request.temperature or 0.0,
        "text": {"format": form.model_dump(by_alias=True) if form else {"type": "text"}},
        "tool_choice": choice.model_dump()
        if isinstance(choice, NamedFunction)
        else choice or ("auto" if not request.tools else "none"),
        "tools": [tool.model_dump() for tool in request.tools or []],
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
    }
