"""The chat template of Qwen3.5 in Python. It differs from that of Qwen3-VL: texts are trimmed, tools
are called in XML, and thoughts of earlier answers are left out.

`render` gives the same kinds of parts as `service.engines.common.chat_template.render`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from service.engines.common.chat_template import (
    TURN_BEGIN,
    TURN_END,
    Piece,
    Special,
    signature,
    turn,
)
from service.errors import InvalidRequest
from service.types import ImagePart, Message, Role, TextPart, ToolCall, ToolDefinition

Parts = tuple[TextPart | ImagePart, ...]

_TOOLS_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
_TOOLS_TAIL = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO "
    "suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n"
    "value_1\n</parameter>\n<parameter=example_parameter_2>\nThis is the value for the second "
    "parameter\nthat can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: an inner "
    "<function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your "
    "function call in natural language BEFORE the function call, but NOT after\n- If there is no "
    "function call available, answer the question like normal with your current knowledge and do "
    "not tell the user about function calls\n</IMPORTANT>"
)
_IMAGE = "\0"
"""Stands for an image where only the text around it is of interest."""


def render(
    messages: Sequence[Message],
    tools: Sequence[ToolDefinition] = (),
    answer_prefix: str = "",
) -> Iterator[Piece]:
    """See `service.engines.common.chat_template.render`.

    Raises InvalidRequest for a conversation in which the user asks nothing: the model's own
    template refuses it, too.
    """
    question = _last_question(messages)
    first = messages[0] if messages[0].role is Role.SYSTEM else None
    if first is not None or tools:
        yield from turn("system\n", _system(first, tools))
    for index, message in enumerate(messages):
        if message.role is Role.USER:
            yield from turn("user\n", _trimmed(message.parts))
        elif message.role is Role.ASSISTANT:
            text = _answer(message, thoughts=index > question)
            yield from turn("assistant\n", (TextPart(text),))
        elif message.role is Role.TOOL:
            yield from _tool_response(messages, index)
    yield Special(TURN_BEGIN)
    yield "assistant\n" + answer_prefix


def _last_question(messages: Sequence[Message]) -> int:
    """Index of the last message in which the user asks, rather than passes the result of a tool."""
    for index in range(len(messages) - 1, -1, -1):
        text = "".join(
            part.text if isinstance(part, TextPart) else _IMAGE for part in messages[index].parts
        ).strip()
        passed = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[index].role is Role.USER and not passed:
            return index
    raise InvalidRequest("task", "has no message in which the user asks something; add one")


def _system(message: Message | None, tools: Sequence[ToolDefinition]) -> Parts:
    parts = _trimmed(message.parts) if message is not None else ()
    if not tools:
        return parts
    listing = _TOOLS_HEAD + "".join("\n" + signature(tool) for tool in tools) + _TOOLS_TAIL
    return (TextPart(listing), *((TextPart("\n\n"), *parts) if parts else ()))


def _answer(message: Message, *, thoughts: bool) -> str:
    """An earlier answer. thoughts: whether it keeps its thoughts, as the answers behind the last
    question do."""
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart)).strip()
    thought = ""
    if "</think>" in text:
        before, *_, text = text.split("</think>")
        thought = before.rstrip("\n").rpartition("<think>")[2].strip()
        text = text.lstrip("\n")
    said = text
    if thoughts:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    for index, call in enumerate(message.tool_calls):
        separator = "\n" if index else "\n\n" if said.strip() else ""
        text += separator + _call(call)
    return text


def _call(call: ToolCall) -> str:
    arguments = "".join(
        f"<parameter={name}>\n{_value(value)}\n</parameter>\n"
        for name, value in json.loads(call.arguments).items()
    )
    return f"<tool_call>\n<function={call.name}>\n{arguments}</function>\n</tool_call>"


def _value(value: object) -> str:
    """As transformers writes it: lists and objects as JSON, everything else as Python does."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _tool_response(messages: Sequence[Message], index: int) -> Iterator[Piece]:
    """A tool response. Consecutive responses share one user turn."""
    if index and messages[index - 1].role is not Role.TOOL:
        yield Special(TURN_BEGIN)
        yield "user"
    yield "\n<tool_response>\n"
    for part in _trimmed(messages[index].parts):
        yield part.text if isinstance(part, TextPart) else part
    yield "\n</tool_response>"
    if index + 1 == len(messages) or messages[index + 1].role is not Role.TOOL:
        yield Special(TURN_END)
        yield "\n"


def _trimmed(parts: Sequence[TextPart | ImagePart]) -> Parts:
    """The parts without white space at the beginning and the end of their joined text."""
    kept = list(parts)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while kept and isinstance(part := kept[end], TextPart):
            if text := strip(part.text):
                kept[end] = TextPart(text)
                break
            del kept[end]
    return tuple(kept)
