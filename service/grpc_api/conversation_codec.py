"""Converts between proto messages and plain values for conversations: messages, images, tools."""

from __future__ import annotations

import re
from collections.abc import Sequence

from service.errors import InvalidRequest, TooManyImages
from service.grpc_api.image_codec import decode_image
from service.pb.qwen3vl.v1 import vision_pb2 as pb
from service.schema_compiler import jsontext
from service.types import (
    EncodedImage,
    ImagePart,
    Message,
    Role,
    TextPart,
    ToolCall,
    ToolDefinition,
)

MAX_MESSAGES = 1024
MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ROLES = {
    pb.ROLE_SYSTEM: Role.SYSTEM,
    pb.ROLE_USER: Role.USER,
    pb.ROLE_ASSISTANT: Role.ASSISTANT,
    pb.ROLE_TOOL: Role.TOOL,
}
WITH_IMAGES = (Role.USER, Role.TOOL)


def decode_messages(
    messages: Sequence[pb.Message], path: str, max_images: int
) -> tuple[tuple[Message, ...], tuple[EncodedImage, ...]]:
    """The messages, with empty image parts, and their images in order.

    Raises ``InvalidRequest`` on the path of the first invalid field.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            path, f"has {len(messages)} messages, at most {MAX_MESSAGES} are allowed"
        )
    images: list[EncodedImage] = []
    found = []
    for index, message in enumerate(messages):
        found.append(_message(message, f"{path}[{index}]", index, images))
    if len(images) > max_images:
        raise TooManyImages(len(images), max_images, path)
    if found[-1].role not in WITH_IMAGES:
        raise InvalidRequest(
            f"{path}[{len(found) - 1}].role",
            "the last message must be one of the user or of a tool: the answer follows it",
        )
    return tuple(found), tuple(images)


def decode_tools(tools: Sequence[pb.ToolDefinition], path: str) -> tuple[ToolDefinition, ...]:
    """The definitions of tools, whose parameters must be JSON objects."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(path, f"has {len(tools)} tools, at most {MAX_TOOLS} are allowed")
    found: dict[str, ToolDefinition] = {}
    for index, tool in enumerate(tools):
        place = f"{path}[{index}]"
        _check_name(tool.name, f"{place}.name")
        if tool.name in found:
            raise InvalidRequest(f"{place}.name", f"{tool.name} is defined twice")
        _check_object(tool.parameters_json, f"{place}.parameters_json")
        found[tool.name] = ToolDefinition(tool.name, tool.parameters_json, tool.description)
    return tuple(found.values())


def _message(message: pb.Message, path: str, index: int, images: list[EncodedImage]) -> Message:
    role = ROLES.get(message.role)
    if role is None:
        names = ", ".join(pb.Role.Name(number) for number in ROLES)
        raise InvalidRequest(f"{path}.role", f"must be one of {names}")
    if role is Role.SYSTEM and index > 0:
        raise InvalidRequest(f"{path}.role", "only the first message may be ROLE_SYSTEM")
    if message.tool_calls and role is not Role.ASSISTANT:
        raise InvalidRequest(f"{path}.tool_calls", "only ROLE_ASSISTANT calls tools")
    if not message.parts and not message.tool_calls:
        raise InvalidRequest(f"{path}.parts", "is empty; add a text, an image or a tool call")
    parts = [
        _part(part, f"{path}.parts[{number}]", role, images)
        for number, part in enumerate(message.parts)
    ]
    calls = [
        _tool_call(call, f"{path}.tool_calls[{number}]")
        for number, call in enumerate(message.tool_calls)
    ]
    return Message(role, tuple(parts), tuple(calls))


def _part(part: pb.Part, path: str, role: Role, images: list[EncodedImage]) -> TextPart | ImagePart:
    kind = part.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(path, "is empty; give a text or an image")
    if kind == "text":
        return TextPart(part.text)
    if role not in WITH_IMAGES:
        raise InvalidRequest(f"{path}.image", "only messages of users and tools may show images")
    images.append(decode_image(part.image, f"{path}.image"))
    return ImagePart()


def _tool_call(call: pb.ToolCall, path: str) -> ToolCall:
    _check_name(call.name, f"{path}.name")
    _check_object(call.arguments_json, f"{path}.arguments_json")
    return ToolCall(call.name, call.arguments_json)


def _check_name(name: str, path: str) -> None:
    if not TOOL_NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, underscores and hyphens"
        raise InvalidRequest(path, f"must be {allowed}, not {jsontext.short(name)}")


def _check_object(text: str, path: str) -> None:
    try:
        value = jsontext.decode(text)
    except jsontext.JsonTextError as error:
        raise InvalidRequest(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(path, "must be a JSON object")
