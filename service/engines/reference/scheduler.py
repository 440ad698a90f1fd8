"""Schedules the sequences of one model.

Each turn drops cancelled sequences, admits sequences that fit, computes one part of one prompt, and
decodes one step for every answer. So a long prompt delays the others by one part only, and a
cancelled request ends after one step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from service.engines.reference.sequence import Sequence
from service.errors import EngineUnavailable, InternalError, ServiceError

if TYPE_CHECKING:
    from service.engines.reference.model import Model

logger = logging.getLogger(__name__)


class Scheduler:
    """The waiting and running sequences of one model. Used by one thread."""

    def __init__(self, model: Model, max_batch: int) -> None:
        """max_batch: maximum number of sequences that run at the same time."""
        self._model = model
        self._max_batch = max_batch
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        """Whether there are no sequences."""
        return not self._waiting and not self._running

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences that run, and that wait. May be read in any thread."""
        return len(self._running), len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def turn(self) -> None:
        """Run one turn. Raises only if the model itself fails, not for the failure of one
        request."""
        self._drop([one for one in (*self._waiting, *self._running) if one.cancelled])
        self._admit()
        self._prefill()
        self._decode()

    def drop_all(self, error: EngineUnavailable) -> None:
        """End every sequence with an error."""
        everyone = [*self._waiting, *self._running]
        for sequence in everyone:
            sequence.fail(error)
        self._drop(everyone)

    def _admit(self) -> None:
        """Admit sequences, first come, first served: later requests do not overtake one that does
        not fit yet."""
        while self._waiting and len(self._running) < self._max_batch:
            run = self._model.cache.runs.reserve(self._waiting[0].reserved)
            if run is None:
                return
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            self._guarded(sequence, partial(sequence.admit, run))

    def _prefill(self) -> None:
        for sequence in self._running:
            if sequence.computed < sequence.prompt_length:
                logits = self._model.runner.prefill(sequence)
                if logits is not None:
                    self._guarded(sequence, partial(sequence.extend, logits))
                return

    def _decode(self) -> None:
        answering = [one for one in self._running if one.answer]
        if not answering:
            return
        for sequence in answering:
            sequence.draft = self._model.draft(sequence)
        for sequence, logits in zip(answering, self._model.runner.decode(answering), strict=True):
            self._guarded(sequence, partial(sequence.extend, logits))

    def _guarded(self, sequence: Sequence, work: Callable[[], None]) -> None:
        """Run ``work`` for a sequence. Its failure ends only this sequence; a finished sequence is
        dropped."""
        try:
            work()
        except ServiceError as error:
            logger.error("a request failed: %s", error.message)
            sequence.fail(error)
        except Exception:
            logger.exception("a request failed")
            sequence.fail(InternalError("internal error"))
        if sequence.finished:
            self._drop([sequence])

    def _drop(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
            if sequence.run is not None:
                self._model.cache.runs.release(sequence.run)
            sequence.released()
