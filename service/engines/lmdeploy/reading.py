"""Converts LMDeploy's outputs to chunks of text, a finish reason, usage and timings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmdeploy.messages import EventType, ResponseType

from lmdeploy_ext.packing import PackedRequest
from service.engines.common.detokenizer import Detokenizer
from service.engines.common.loops import LoopGuard
from service.engines.lmdeploy.outcomes import error_of
from service.types import Chunk, FinishReason, Timings, Usage


class Reader:
    """Reads the answer of one request."""

    def __init__(
        self,
        table: Sequence[bytes],
        stop_ids: frozenset[int],
        guard: LoopGuard,
        received: float,
        thinks: bool = False,
    ) -> None:
        """received: ``time.monotonic`` at which the engine received the request.
        thinks: whether the answer begins with thoughts.
        """
        self._limit = 0
        self._detokenizer = Detokenizer(table, thinks=thinks)
        self._stop_ids = stop_ids
        self._guard = guard
        self._received = received
        self._sent = self._first = received
        self._queue_s = 0.0
        self._answer: list[int] = []
        self._usage = Usage()

    def begin(self, prompt: PackedRequest, limit: int) -> None:
        """Called when the request is sent to LMDeploy. limit: maximum number of answer tokens."""
        self._limit = limit
        self._sent = time.monotonic()
        images = sum(end - begin for begin, end in prompt.spans)
        self._usage = Usage(len(prompt.token_ids), images, 0)

    def read(self, output: Any) -> Chunk | None:
        """The chunk of an output; None if the output completes no character.

        The chunk with a finish reason is the last one; later outputs of LMDeploy are ignored.
        Raises the error for the status of the output.
        """
        error = error_of(output.status)
        if error is not None:
            raise error
        self._note(output)
        text = ""
        for token in output.token_ids:
            reason = self._take(token)
            if reason is None or reason is FinishReason.LOOP:
                text += self._detokenizer.feed(token)
            if reason is not None:
                return self._last(text, reason)
        if output.status is ResponseType.FINISH:
            return self._last(text, FinishReason.LENGTH)
        return Chunk(text, usage=self._so_far()) if text else None

    def _take(self, token: int) -> FinishReason | None:
        if token in self._stop_ids:
            return FinishReason.STOP
        if len(self._answer) >= self._limit:
            # One token more than the limit was requested, to see whether the answer ends.
            return FinishReason.LENGTH
        self._answer.append(token)
        return FinishReason.LOOP if self._guard.trips(self._answer) else None

    def _note(self, output: Any) -> None:
        """Record the timings of an output."""
        if output.token_ids and self._first == self._received:
            self._first = time.monotonic()
        metrics = output.req_metrics
        events = (
            {} if metrics is None else {one.type: one.timestamp for one in metrics.engine_events}
        )
        if EventType.QUEUED in events and EventType.SCHEDULED in events:
            self._queue_s = max(0.0, events[EventType.SCHEDULED] - events[EventType.QUEUED])

    def _so_far(self) -> Usage:
        return replace(self._usage, output_tokens=len(self._answer))

    def _last(self, text: str, reason: FinishReason) -> Chunk:
        now = time.monotonic()
        first_s = (self._first if self._first > self._received else now) - self._received
        # LMDeploy uses another clock: limit its queue time to the time of the first token.
        queue_s = min(self._sent - self._received + self._queue_s, first_s)
        return Chunk(
            text + self._detokenizer.finish(),
            reason,
            self._so_far(),
            Timings(queue_s, first_s, now - self._received),
        )
