"""Answers as objects of OpenAI's Responses API: a response, and the events of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from service.http_api.answers import dumps, extras, joined, text_of
from service.http_api.codec import Asked
from service.inference.calls import Answer
from service.types import FinishReason, Usage

CUT = (FinishReason.LENGTH, FinishReason.LOOP)
MARK = "\u0000"


@dataclass
class Response:
    """One answer, whole or as a stream of typed events. One object for each request.

    request_id: of which the names of the answer and of its item are made. created: seconds since 1970.
    """

    request_id: str
    asked: Asked
    created: int = field(default_factory=lambda: int(time.time()))
    _number: int = -1

    closing = b""
    """What ends a stream; its last event says that it is the last."""

    def whole(self, answer: Answer) -> bytes:
        """Answer -> response."""
        cut = answer.finish_reason in CUT
        status = "incomplete" if cut else "completed"
        response = self._response(
            status,
            [self._item(text_of(answer), status)],
            completed_at=None if cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=encode_usage(answer.usage),
        )
        return joined(response, extras(answer))

    async def events(
        self, events: AsyncGenerator[str | Answer, None], *, whole: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """Pieces of text and the answer -> server-sent events.

        whole: the text of the answer is not what the model wrote, so it is sent in one piece.
        """
        before, between, after = self._around_delta()
        begun = False
        async with aclosing(events) as opened:
            async for event in opened:
                if not begun:
                    for one in self._opening():
                        yield one
                    begun = True
                text = event if isinstance(event, str) else text_of(event)
                if isinstance(event, str) is not whole:
                    number = str(self._next()).encode()
                    data = json.dumps(text, ensure_ascii=False).encode()
                    yield b"".join((before, number, between, data, after))
                if isinstance(event, Answer):
                    for one in self._ending(event):
                        yield one

    def failed(self, error: dict[str, Any]) -> bytes:
        """The last events of a stream that ends with an error: one that says what became of the
        response, and one at which SDKs raise, so that no cut answer is taken for a whole one."""
        short = {"code": error["code"], "message": error["message"]}
        response = self._response("failed", [], error=short)
        return self._lifecycle("response.failed", response) + self._event(
            "error", **short, param=error["param"], error=error
        )

    def _opening(self) -> list[bytes]:
        response = self._response("in_progress", [])
        found = [
            self._lifecycle("response.created", response),
            self._lifecycle("response.in_progress", response),
            self._event(
                "response.output_item.added", output_index=0, item=self._item(None, "in_progress")
            ),
        ]
        if self.asked.tool is None:
            part = self._event("response.content_part.added", **self._place(), part=_part(""))
            found.append(part)
        return found

    def _ending(self, answer: Answer) -> list[bytes]:
        text = text_of(answer)
        status = "incomplete" if answer.finish_reason in CUT else "completed"
        if self.asked.tool is None:
            place = self._place()
            found = [
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_part(text)),
            ]
        else:
            place = {"item_id": self._item_id, "output_index": 0}
            found = [
                self._event(
                    "response.function_call_arguments.done",
                    **place,
                    name=self.asked.tool,
                    arguments=text,
                )
            ]
        item = self._item(text, status)
        found.append(self._event("response.output_item.done", output_index=0, item=item))
        found.append(self._lifecycle(f"response.{status}", self.whole(answer)))
        return found

    def _around_delta(self) -> tuple[bytes, bytes, bytes]:
        """An event with a piece of text, without its number and the piece: encoded once for all."""
        if self.asked.tool is None:
            kind, place = "response.output_text.delta", {**self._place(), "logprobs": []}
        else:
            kind = "response.function_call_arguments.delta"
            place = {"item_id": self._item_id, "output_index": 0}
        data = {"type": kind, **place, "sequence_number": MARK, "delta": MARK}
        before, between, after = _framed(kind, dumps(data)).split(dumps(MARK))
        return before, between, after

    @property
    def _item_id(self) -> str:
        return f"{'msg' if self.asked.tool is None else 'fc'}_{self.request_id}"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        """The one item of the output. text: None before there is any."""
        head = {"id": self._item_id, "status": status}
        if self.asked.tool is None:
            content = [] if text is None else [_part(text)]
            return {**head, "type": "message", "role": "assistant", "content": content}
        call = {"call_id": f"call_{self.request_id}", "name": self.asked.tool}
        return {**head, "type": "function_call", **call, "arguments": text or ""}

    def _response(self, status: str, output: list[dict[str, Any]], **more: Any) -> bytes:
        """The response as JSON; fields that are not given are null."""
        head = {
            "id": f"resp_{self.request_id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "completed_at": None,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self.asked.model,
            "output": output,
            "usage": None,
            **more,
        }
        return dumps(head)[:-1] + b"," + self.asked.echo[1:]

    def _lifecycle(self, kind: str, response: bytes) -> bytes:
        head = dumps({"type": kind, "sequence_number": self._next()})[:-1]
        return _framed(kind, head + b',"response":' + response + b"}")

    def _event(self, kind: str, **fields: Any) -> bytes:
        return _framed(kind, dumps({"type": kind, **fields, "sequence_number": self._next()}))

    def _next(self) -> int:
        self._number += 1
        return self._number


def encode_usage(usage: Usage) -> dict[str, Any]:
    """Usage -> usage of a response, with the tokens of images among those of the input."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": 0,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _framed(kind: str, data: bytes) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
