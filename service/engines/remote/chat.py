"""Bodies of requests for chat completions."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.engines.remote.backend import BackEnd, State
from service.engines.remote.images import EncodedFile
from service.engines.remote.servers import Verbatim
from service.errors import InvalidRequest
from service.types import (
    DEFAULT_MAX_TOKENS,
    GenerateRequest,
    Grammar,
    ImagePart,
    Message,
    Role,
    Sampling,
    TextPart,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is put to a server.

    grammar: the grammar in the form that the server takes; None sends none. limit: send the maximum
    number of tokens, where the caller sets none.
    """

    grammar: Grammar | None
    stream: bool
    limit: bool = True


def encode(
    request: GenerateRequest, images: Sequence[EncodedFile], back_end: BackEnd, plan: Plan
) -> bytes:
    """The body of POST /v1/chat/completions. images: in the order of the prompt."""
    body: dict[str, Any] = {
        "model": back_end.model,
        "messages": _messages(request.conversation, images),
        "stream": plan.stream,
        **back_end.server.fixed,
        **sampling_fields(request.sampling, back_end, plan),
    }
    if plan.stream:
        body["stream_options"] = {"include_usage": True}
    if back_end.thinking.state is State.YES:
        body |= back_end.server.no_thinking
    if plan.grammar is not None:
        body |= back_end.server.grammars[plan.grammar.kind](plan.grammar)
    return dumps(body)


def sampling_fields(sampling: Sampling, back_end: BackEnd, plan: Plan) -> dict[str, Any]:
    """The options by the names of the server. The temperature is always sent: servers have defaults
    of their own, and ours is greedy decoding."""
    server = back_end.server
    found: dict[str, Any] = {}
    defaults = Sampling()
    for name, spelling in server.names.items():
        value = getattr(sampling, name)
        if name == "temperature" or value != getattr(defaults, name):
            found[spelling] = value % server.seeds if name == "seed" else value
    wanted = plan.limit and not server.limits_itself
    limit = sampling.max_tokens or (DEFAULT_MAX_TOKENS if wanted else None)
    if limit is not None:
        found[back_end.token_limit or server.token_limit] = limit
    return found


def check_supported(request: GenerateRequest) -> None:
    """Raise ``InvalidRequest`` for what no chat API can pass on as it is meant."""
    if request.tools:
        raise InvalidRequest(
            "task.inline.tools",
            "cannot be used on a remote server, which would answer with calls of its own form; "
            "describe the tools in the prompt and their call in a JSON schema",
        )


def _messages(
    conversation: Sequence[Message], images: Sequence[EncodedFile]
) -> list[dict[str, Any]]:
    remaining = iter(images)
    found: list[dict[str, Any]] = []
    calls = answered = 0
    for message in conversation:
        one: dict[str, Any] = {"role": message.role.value, "content": _content(message, remaining)}
        if message.tool_calls:
            one["tool_calls"] = [
                {
                    "id": f"call_{calls + index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(message.tool_calls)
            ]
            one["content"] = one["content"] or None
            calls += len(message.tool_calls)
        if message.role is Role.TOOL:
            one["tool_call_id"] = f"call_{answered}"
            answered += 1
        found.append(one)
    return found


def _content(message: Message, images: Iterator[EncodedFile]) -> str | list[dict[str, Any]]:
    """Text alone as a string, which every server takes; otherwise parts in their order."""
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return "".join(part.text for part in message.parts if isinstance(part, TextPart))
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image_url", "image_url": {"url": Ascii(next(images).url)}}
        for part in message.parts
    ]


class Ascii(bytes):
    """A text that JSON writes as it is, such as base64. Megabytes are not searched for characters to
    escape."""


def dumps(body: Mapping[str, Any]) -> bytes:
    """A body as JSON. ``Verbatim`` texts stand in it as they are, without quotes."""
    mark = secrets.token_hex(16)
    apart: list[bytes] = []

    def marked(value: Any) -> str:
        """Called for what is no value of JSON."""
        if isinstance(value, Verbatim):
            apart.append(value.text.encode("utf-8", "replace"))
        elif isinstance(value, Ascii):
            apart.append(b'"%s"' % value)
        else:
            raise TypeError(f"{type(value).__name__} is no value of JSON")
        return mark

    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=marked)
    between = text.encode("utf-8", "replace").split(b'"%s"' % mark.encode("ascii"))
    return b"".join(one for pair in zip(between, [*apart, b""], strict=True) for one in pair)
