"""Answers as OpenAI's objects: a completion, and the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from service.http_api.codec import Asked
from service.inference.calls import Answer
from service.schema_compiler.report import GrammarReport, KeywordReport, SchemaWarning
from service.types import FinishReason, Timings, Usage

FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.STOP_TEXT: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.LOOP: "length",
}
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
REPORT_BYTES = 64 * 1024
"""Most bytes of the keywords and the warnings that go with every answer."""


def dumps(value: Any) -> bytes:
    """JSON as UTF-8, without blanks."""
    return _ENCODER.encode(value).encode()


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, whole or as a stream of chunks.

    request_id: of which the name of the answer is made. created: seconds since 1970.
    """

    request_id: str
    asked: Asked
    created: int = field(default_factory=lambda: int(time.time()))

    closing = DONE
    """What ends a stream."""

    def whole(self, answer: Answer) -> bytes:
        """Answer -> chat.completion."""
        found = {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": 0,
                    "message": self._message(text_of(answer)),
                    "logprobs": None,
                    "finish_reason": self._finish_reason(answer),
                }
            ],
            "usage": encode_usage(answer.usage),
        }
        return joined(dumps(found), extras(answer))

    async def events(
        self, events: AsyncGenerator[str | Answer, None], *, whole: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """Pieces of text and the answer -> server-sent events with a chat.completion.chunk each.

        whole: the text of the answer is not what the model wrote, so it is sent in one piece.
        """
        begin, end = self._around_text()
        begun = False
        async with aclosing(events) as opened:
            async for event in opened:
                if not begun:
                    yield self._chunk(self._opening())
                    begun = True
                text = event if isinstance(event, str) else text_of(event)
                if isinstance(event, str) is not whole:
                    yield begin + json.dumps(text, ensure_ascii=False).encode() + end
                if isinstance(event, Answer):
                    yield self._chunk({}, self._finish_reason(event), extras(event))
                    if self.asked.include_usage:
                        yield self._usage_chunk(event.usage)

    def failed(self, error: dict[str, Any]) -> bytes:
        """The last event of a stream that ends with an error."""
        return _framed(dumps({"error": error})) + DONE

    def _usage_chunk(self, usage: Usage) -> bytes:
        head = self._head("chat.completion.chunk")
        return _framed(dumps({**head, "choices": [], "usage": encode_usage(usage)}))

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
        }

    def _message(self, text: str) -> dict[str, Any]:
        if self.asked.tool is None:
            return {"role": "assistant", "content": text, "refusal": None}
        return {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [self._tool_call(text)],
        }

    def _tool_call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self.asked.tool, "arguments": arguments}
        return {"id": f"call_{self.request_id}", "type": "function", "function": function}

    def _opening(self) -> dict[str, Any]:
        if self.asked.tool is None:
            return {"role": "assistant", "content": "", "refusal": None}
        call = {"index": 0, **self._tool_call("")}
        return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}

    def _around_text(self) -> tuple[bytes, bytes]:
        """A chunk of text, without the text: encoded once for all of them."""
        mark = "\u0000"
        call = {"index": 0, "function": {"arguments": mark}}
        delta = {"content": mark} if self.asked.tool is None else {"tool_calls": [call]}
        begin, _, end = self._chunk(delta).partition(dumps(mark))
        return begin, end

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, more: bytes = b""
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.asked.include_usage else {}
        head = self._head("chat.completion.chunk")
        return _framed(joined(dumps({**head, "choices": [choice], **usage}), more))

    def _finish_reason(self, answer: Answer) -> str:
        return "tool_calls" if self.asked.tool else FINISH_REASONS[answer.finish_reason]


def _framed(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def text_of(answer: Answer) -> str:
    """The text of an answer for a caller: JSON, where the task answers in JSON."""
    return answer.text if answer.json is None else answer.json


def encode_usage(usage: Usage) -> dict[str, Any]:
    """Usage -> usage of OpenAI, with the tokens of images among those of the prompt."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"image_tokens": usage.image_tokens},
    }


def joined(found: bytes, members: bytes) -> bytes:
    """An object of JSON with further members, which may be empty."""
    return b"%s,%s}" % (found[:-1], members) if members else found


def extras(answer: Answer) -> bytes:
    """What OpenAI's objects have no field for, as members of an object of JSON: the timings, and what is
    enforced of the schema."""
    timings = dumps({"timings": encode_timings(answer.timings)})[1:-1]
    if answer.report is None:
        return timings
    report = joined(encode_report(answer.report), b'"attempts":%d' % answer.attempts)
    return b'%s,"structured_output":%s' % (timings, report)


def encode_timings(timings: Timings) -> dict[str, float]:
    """Timings -> seconds."""
    return {
        "queue_seconds": round(timings.queue_s, 6),
        "first_token_seconds": round(timings.first_token_s, 6),
        "total_seconds": round(timings.total_s, 6),
    }


@lru_cache(maxsize=32)
def encode_report(report: GrammarReport) -> bytes:
    """What a grammar enforces, the keywords that are only checked, and warnings on the schema, as JSON:
    the same in every answer under a schema, and often longer than the answer."""
    checked = fitting(map(encode_keyword, report.checked))
    return dumps(
        {
            "enforcement": report.enforcement.value,
            "checked": checked,
            "checked_omitted": len(report.checked) - len(checked),
            "warnings": fitting(map(encode_warning, report.warnings)),
        }
    )


def encode_keyword(keyword: KeywordReport) -> dict[str, str]:
    """KeywordReport -> its pointer, name and reason."""
    return {"pointer": keyword.pointer, "keyword": keyword.keyword, "reason": keyword.why}


def encode_warning(warning: SchemaWarning) -> dict[str, str]:
    """SchemaWarning -> its pointer, kind and message."""
    return {
        "pointer": warning.pointer,
        "kind": warning.kind.value,
        "message": warning.message,
    }


def fitting(found: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The first entries, as many as have room: pointers into a deep schema are long."""
    kept: list[dict[str, str]] = []
    left = REPORT_BYTES
    for one in found:
        left -= len(dumps(one))
        if left < 0:
            break
        kept.append(one)
    return kept
