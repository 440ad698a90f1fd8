"""The chat template of Qwen3-VL in Python: produces the same prompt as the Jinja template of the checkpoint.

Jinja would join everything into one string, in which the text of a caller cannot be told apart from
a special token. `render` returns special tokens and images as separate values, so that text always
stays text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from service.types import ImagePart, Message, Role, TextPart, ToolCall, ToolDefinition

TURN_BEGIN = "<|im_start|>"
TURN_END = "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Special:
    """A special token, by its name in the vocabulary."""

    token: str


Piece: TypeAlias = "str | Special | ImagePart"


_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


def render(
    messages: Sequence[Message],
    tools: Sequence[ToolDefinition] = (),
    answer_prefix: str = "",
) -> Iterator[Piece]:
    """The parts of the prompt, up to the point where the assistant's answer begins.

    messages: already checked: a system message only at the beginning, images only in messages of
    users and tools. Adjacent texts are separate parts; join them before tokenisation, because the
    tokenizer may merge characters across their boundary.
    """
    first = messages[0] if messages and messages[0].role is Role.SYSTEM else None
    if first is not None or tools:
        yield from _system(first, tools)
    for index, message in enumerate(messages):
        if message.role is Role.USER:
            yield from turn("user\n", message.parts)
        elif message.role is Role.ASSISTANT:
            yield from turn("assistant\n", (*message.parts, *_calls(message)))
        elif message.role is Role.TOOL:
            yield from _tool_response(messages, index)
    yield Special(TURN_BEGIN)
    yield "assistant\n" + answer_prefix


def joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same parts with adjacent texts joined and empty texts removed."""
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            yield text
        text = ""
        yield piece
    if text:
        yield text


def _system(message: Message | None, tools: Sequence[ToolDefinition]) -> Iterator[Piece]:
    parts = message.parts if message is not None else ()
    if not tools:
        yield from turn("system\n", parts)
        return
    separator = [TextPart("\n\n")] if message is not None else []
    signatures = "".join("\n" + signature(tool) for tool in tools)
    listing = TextPart(_TOOLS_HEAD + signatures + _TOOLS_TAIL)
    yield from turn("system\n", (*parts, *separator, listing))


def turn(head: str, parts: Sequence[TextPart | ImagePart]) -> Iterator[Piece]:
    """One turn. head: the role and a newline."""
    yield Special(TURN_BEGIN)
    yield head
    for part in parts:
        yield part.text if isinstance(part, TextPart) else part
    yield Special(TURN_END)
    yield "\n"


def _calls(message: Message) -> Iterator[TextPart]:
    separate = any(not isinstance(part, TextPart) or part.text for part in message.parts)
    for call in message.tool_calls:
        yield TextPart(("\n" if separate else "") + _call(call))
        separate = True


def _call(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'


def _tool_response(messages: Sequence[Message], index: int) -> Iterator[Piece]:
    """A tool response. Consecutive responses share one user turn."""
    if index == 0 or messages[index - 1].role is not Role.TOOL:
        yield Special(TURN_BEGIN)
        yield "user"
    yield "\n<tool_response>\n"
    for part in messages[index].parts:
        yield part.text if isinstance(part, TextPart) else part
    yield "\n</tool_response>"
    if index + 1 == len(messages) or messages[index + 1].role is not Role.TOOL:
        yield Special(TURN_END)
        yield "\n"


def signature(tool: ToolDefinition) -> str:
    """A tool definition as JSON, with the whitespace of the ``tojson`` filter of transformers."""
    function: dict[str, object] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = json.loads(tool.parameters)
    return json.dumps({"type": "function", "function": function}, ensure_ascii=False)
