"""What a replica sends: values, errors included. Ray turns an exception that is raised in a replica
into one of its own, which has lost its fields."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass
from typing import Any

from service.errors import EngineUnavailable, InferenceTimeout, ServiceError, forget_frames
from service.types import Chunk, FinishReason, Timings, Usage

log = logging.getLogger(__name__)


class ReplicaError(RuntimeError):
    """A defect in a replica: its traceback as text, for the log of the server."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that cross together.

    error: why there are no more. age_s: seconds since the replica began the request.
    """

    chunks: list[Chunk]
    error: Exception | None
    age_s: float

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        ended = bool(self.chunks) and self.chunks[-1].finish_reason is not None
        return ended or self.error is not None

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle chunks as plain tuples: dataclasses take about thirty times as long."""
        return _restored, ([_plain(chunk) for chunk in self.chunks], self.error, self.age_s)


def _plain(chunk: Chunk) -> tuple[Any, ...]:
    usage, reason, end = chunk.usage, chunk.finish_reason, None
    if reason is not None:
        timings = chunk.timings
        end = (reason.value, timings.queue_s, timings.first_token_s, timings.total_s)
    return chunk.text, usage.prompt_tokens, usage.image_tokens, usage.output_tokens, end


def _restored(plain: list[tuple[Any, ...]], error: Exception | None, age_s: float) -> Batch:
    chunks = []
    for text, prompt, image, output, end in plain:
        usage = Usage(prompt, image, output)
        if end is None:
            chunks.append(Chunk(text, None, usage))
        else:
            chunks.append(Chunk(text, FinishReason(end[0]), usage, Timings(*end[1:])))
    return Batch(chunks, error, age_s)


def as_value(error: Exception) -> Exception:
    """An error that survives the way to the server: a ``ServiceError`` as it is, any other one as
    text."""
    if isinstance(error, ServiceError):
        forget_frames(error)
        error.__cause__ = error.__context__ = None
        return error
    log.exception("the engine of a replica failed", exc_info=error)
    return ReplicaError("".join(traceback.format_exception(error)))


def late() -> InferenceTimeout:
    """The error of a request whose deadline has passed in a replica, or on the way to it."""
    return InferenceTimeout("Inference took longer than the deadline.")


def lost(error: Exception) -> bool:
    """Whether a request may be run again on another replica: the engine of this one has ended or
    makes no progress."""
    return isinstance(error, EngineUnavailable)
