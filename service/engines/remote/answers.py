"""Reads answers of chat completions, whole or streamed, and accepts only complete ones.

A server may drop a grammar, cut a stream or answer twice, and still say 200. Whatever is not one
complete text raises ``BackEndAnswerInvalid``; whether the text fits its schema is checked later,
where every engine's answers are.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from service.engines.remote.own_errors import error_of, told_in
from service.engines.remote.wire import Incoming
from service.errors import BackEndAnswerInvalid, BackEndFailed, OutputTruncated
from service.types import FinishReason, Usage

INLINE_BYTES = 64 * 1024
"""Size up to which a body is parsed on the event loop: a thread would cost more."""
MAX_EVENT_BYTES = 1 << 20
"""Maximum size of one event of a stream, in bytes."""
FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""Finish reasons of an answer that can be used. Under ``length`` it is cut, and treated as on every
engine."""
_DONE = object()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has arrived. tokens: of the answer so far, counted by deltas."""

    text: str
    tokens: int


@dataclass(slots=True)
class Reader:
    """What has been read of one answer.

    answers_as: name of the model that the answer must have; empty accepts any. marks_end: a stream
    ends with ``[DONE]``. own: of a server of this project, whose errors have reasons.
    """

    answers_as: str = ""
    marks_end: bool = True
    own: bool = False
    model: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    deltas: int = 0
    _characters: int = 0
    _thoughts: int = 0
    _done: bool = False
    _buffer: bytearray = field(default_factory=bytearray)

    async def whole(self, incoming: Incoming) -> str:
        """The text of a chat.completion."""
        body = await incoming.body()
        large = len(body) > INLINE_BYTES
        parsed = asyncio.to_thread(_object, body, "the body") if large else None
        completion = _object(body, "the body") if parsed is None else await parsed
        self._note(completion)
        choice = self._choice(completion)
        if choice is None:
            raise invalid("choices", "has no choice")
        message = choice.get("message")
        if not isinstance(message, dict):
            raise invalid("content", "has no message")
        self._refuse_other_channels(message)
        text = message.get("content")
        if not isinstance(text, str):
            raise self._no_text()
        self._count(text)
        self._finish(choice)
        self._done = True
        self.check_complete()
        return text

    async def streamed(self, incoming: Incoming) -> AsyncIterator[Piece]:
        """The text of a stream of chat.completion.chunk, in pieces as they arrive."""
        async for events in _events(incoming, self._buffer):
            texts: list[str] = []
            cut: OutputTruncated | None = None
            try:
                texts.extend(map(self._delta, events))
            except OutputTruncated as error:  # the text before it counts
                cut = error
            if text := "".join(texts):
                yield Piece(text, self.deltas)
            if cut is not None:
                raise cut
            if self._done:
                break
        self.check_complete()

    def check_complete(self) -> None:
        """Raises unless the answer has come to its end."""
        if self.finish_reason is None:
            raise invalid("incomplete", "ends without a finish reason")
        if not self._done and self.marks_end:
            raise invalid("incomplete", "ends without [DONE]")
        if not self._characters and self._thoughts:
            raise self._no_text()

    def _delta(self, event: dict[str, Any] | object) -> str:
        if event is _DONE:
            self._done = True
            return ""
        assert isinstance(event, dict)
        return self.take(event)

    def take(self, event: dict[str, Any]) -> str:
        """The text of a chat.completion.chunk."""
        self._note(event)
        choice = self._choice(event)
        if choice is None:
            return ""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            raise invalid("content", "has a choice without a delta")
        self._refuse_other_channels(delta)
        text = delta.get("content")
        if text is not None and not isinstance(text, str):
            raise invalid("content", "has a delta whose content is no text")
        if text:
            if self.finish_reason is not None:
                raise invalid("finish_reason", "goes on after its finish reason")
            self._count(text)
        self._finish(choice)
        return text or ""

    def _note(self, value: dict[str, Any]) -> None:
        """What stands beside the choices: an error, the name of the model, the tokens."""
        if value.get("error") is not None:
            log.warning("a model server failed within an answer: %.500r", value["error"])
            told = told_in(value["error"]) if self.own else None
            if told is not None:
                raise error_of(told)
            raise BackEndFailed(
                "The model server began an answer and then failed; the operator finds its error in "
                "the log.",
                metadata={"status": "200"},
            )
        model = value.get("model")
        if isinstance(model, str) and model:
            if self.answers_as and model != self.answers_as:
                raise invalid("model", "is of another model than the one that was asked")
            self.model = model
        usage = usage_of(value.get("usage"))
        if usage is not None:
            self.usage = usage

    @staticmethod
    def _choice(value: dict[str, Any]) -> dict[str, Any] | None:
        """The only choice; None where there is none, as beside the usage of a stream."""
        choices = value.get("choices")
        if not isinstance(choices, list):
            raise invalid("choices", "has no list of choices")
        if not choices:
            return None
        choice = choices[0]
        if len(choices) > 1 or not isinstance(choice, dict) or choice.get("index", 0) != 0:
            raise invalid("choices", "has several choices, and one was asked for")
        return choice

    def _refuse_other_channels(self, message: dict[str, Any]) -> None:
        if message.get("tool_calls"):
            raise invalid("tool_calls", "calls a tool, and none was offered")
        if message.get("refusal"):
            raise invalid("refusal", "is a refusal")
        for name in ("reasoning_content", "reasoning", "thinking"):
            thought = message.get(name)
            if isinstance(thought, str):
                self._thoughts += len(thought)

    def _count(self, text: str) -> None:
        self.deltas += bool(text)
        self._characters += len(text)

    def _finish(self, choice: dict[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason is None:
            return
        if not isinstance(reason, str) or reason not in FINISH_REASONS:
            raise invalid("finish_reason", "has a finish reason other than stop and length")
        self.finish_reason = FINISH_REASONS[reason]

    def _no_text(self) -> BackEndAnswerInvalid:
        if self._thoughts:
            return invalid(
                "reasoning",
                "is in the channel for thoughts, and its content is empty; turn thoughts off",
            )
        return invalid("content", "has no text as its content")


def invalid(fault: str, what: str) -> BackEndAnswerInvalid:
    """The error of an answer that cannot be used."""
    return BackEndAnswerInvalid(
        f"The answer of the model server {what}.", metadata={"fault": fault}
    )


def usage_of(value: Any) -> Usage | None:
    """The tokens of an answer; None where the server does not tell them."""
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    images = details.get("image_tokens") if isinstance(details, dict) else None
    found = (value.get("prompt_tokens"), images or 0, value.get("completion_tokens"))
    counts = [one for one in found if isinstance(one, int) and one >= 0]
    return Usage(*counts) if len(counts) == len(found) else None


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise invalid("not_json", f"is no JSON: {what} cannot be read") from None
    if not isinstance(value, dict):
        raise invalid("not_json", f"is no JSON object: {what} is something else")
    return value


async def _events(
    incoming: Incoming, buffer: bytearray
) -> AsyncIterator[list[dict[str, Any] | object]]:
    """The data of server-sent events; one list for what arrived together."""
    async for piece in incoming.pieces():
        buffer += piece
        found: list[dict[str, Any] | object] = []
        begin = 0
        while (end := buffer.find(b"\n", begin)) >= 0:
            line = bytes(buffer[begin:end]).rstrip(b"\r")
            begin = end + 1
            if line.startswith(b"data:"):
                data = line[5:].strip()
                found.append(_DONE if data == b"[DONE]" else _object(data, "an event"))
            elif line and not line.startswith((b":", b"event:", b"id:", b"retry:")):
                raise invalid("not_json", "is no stream of events")
        del buffer[:begin]
        if len(buffer) > MAX_EVENT_BYTES:
            raise invalid("too_large", f"has an event of more than {MAX_EVENT_BYTES} bytes")
        if found:
            yield found
    if buffer.strip():
        raise invalid("incomplete", "ends within an event")
