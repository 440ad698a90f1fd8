"""Ollama's own API, POST /api/chat. Its OpenAI API cuts prompts that are too long without a word."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from service.engines.remote.answers import MAX_EVENT_BYTES, Piece, Reader, invalid
from service.engines.remote.backend import BackEnd, State
from service.engines.remote.chat import Ascii, Plan, dumps, sampling_fields
from service.engines.remote.images import EncodedFile
from service.engines.remote.wire import Incoming
from service.types import GenerateRequest, ImagePart, Message, TextPart

PATH = "/api/chat"


def encode(
    request: GenerateRequest, images: Sequence[EncodedFile], back_end: BackEnd, plan: Plan
) -> bytes:
    """The body of POST /api/chat. images: in the order of the prompt."""
    options = sampling_fields(request.sampling, back_end, plan)
    if back_end.context_length is not None:
        options["num_ctx"] = back_end.context_length
    body: dict[str, Any] = {
        "model": back_end.model,
        "messages": _messages(request.conversation, images),
        "stream": True,
        "options": options,
        **back_end.server.fixed,
    }
    if back_end.thinking.state is State.YES:
        body |= back_end.server.no_thinking
    if plan.grammar is not None:
        body |= back_end.server.grammars[plan.grammar.kind](plan.grammar)
    return dumps(body)


def _messages(
    conversation: Sequence[Message], images: Sequence[EncodedFile]
) -> list[dict[str, Any]]:
    """Images stand before the text of a message there, so a text before an image is a message of
    its own."""
    remaining = iter(images)
    found: list[dict[str, Any]] = []
    for message in conversation:
        role = message.role.value
        one: dict[str, Any] = {"role": role, "content": ""}
        for part in message.parts:
            if isinstance(part, ImagePart):
                if one["content"]:
                    found.append(one)
                    one = {"role": role, "content": ""}
                one.setdefault("images", []).append(Ascii(next(remaining).base64))
            else:
                assert isinstance(part, TextPart)
                one["content"] += part.text
        if message.tool_calls:
            one["tool_calls"] = [
                {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in message.tool_calls
            ]
        found.append(one)
    return found


class OllamaReader(Reader):
    """Reads lines of JSON; the last one has ``done``."""

    async def streamed(self, incoming: Incoming) -> AsyncIterator[Piece]:
        buffer = bytearray()
        async for piece in incoming.pieces():
            buffer += piece
            *lines, rest = bytes(buffer).split(b"\n")
            buffer[:] = rest
            if len(rest) > MAX_EVENT_BYTES:
                raise invalid("too_large", f"has a line of more than {MAX_EVENT_BYTES} bytes")
            text = "".join(self._line(line) for line in lines if line.strip())
            if text:
                yield Piece(text, self.deltas)
        if buffer.strip():
            raise invalid("incomplete", "ends within a line")
        self.check_complete()

    def _line(self, line: bytes) -> str:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise invalid("not_json", "is no stream of JSON objects")
        return self.take(as_chunk(value))


def as_chunk(value: dict[str, Any]) -> dict[str, Any]:
    """A line of Ollama -> chat.completion.chunk, which the reader checks."""
    if value.get("error") is not None:
        return {"error": value["error"], "choices": []}
    message = value.get("message")
    done = value.get("done") is True
    choice: dict[str, Any] = {"index": 0, "delta": message, "finish_reason": None}
    found: dict[str, Any] = {"model": value.get("model"), "choices": [choice]}
    if done:
        choice["finish_reason"] = value.get("done_reason", "unknown")
        counts = value.get("prompt_eval_count"), value.get("eval_count")
        found["usage"] = {"prompt_tokens": counts[0], "completion_tokens": counts[1]}
    return found
