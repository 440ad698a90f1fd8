"""The thread that runs the model. It handles commands between two turns of the scheduler."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from service.engines.reference.scheduler import Scheduler
from service.engines.reference.sequence import Sequence
from service.errors import EngineUnavailable

if TYPE_CHECKING:
    from service.engines.reference.model import Model

logger = logging.getLogger(__name__)

_FAILURES = 3  # consecutive failed turns after which the engine counts as broken


class Worker:
    """Loads a model and runs sequences on it in its own thread.

    Args:
        load: builds the model; called in the worker's thread.
        max_batch: sequences that run at the same time.
        flush: called after every turn, when all events of the turn have been emitted.
    """

    def __init__(
        self, load: Callable[[], Model], max_batch: int, flush: Callable[[], None]
    ) -> None:
        self._load = load
        self._flush = flush
        self._max_batch = max_batch
        self._commands: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._stopping = False
        self._failures = 0
        self._beat = time.monotonic()
        self._busy = False
        self._scheduler: Scheduler | None = None
        self.loaded: Future[Model] = Future()
        self._thread = threading.Thread(target=self._main, name="reference-engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the model and then completes the future ``loaded``."""
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence. Thread-safe."""
        self._commands.put(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence before the next step; the sequence reports when its memory is free.
        Thread-safe."""
        sequence.cancelled = True
        self._commands.put(None)

    def stop(self) -> None:
        """End every sequence with EngineUnavailable, then end the thread. Thread-safe."""
        self._stopping = True
        self._commands.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def counts(self) -> tuple[int, int]:
        """Sequences that run, and those that wait for a place in the batch. Thread-safe."""
        return (0, 0) if self._scheduler is None else self._scheduler.counts

    def check(self, stall_s: float) -> None:
        """Raises EngineUnavailable if the thread has ended, makes no progress, or fails
        repeatedly."""
        if not self._thread.is_alive():
            raise EngineUnavailable("the engine's thread has ended", reason="ENGINE_DEAD")
        if self._failures >= _FAILURES:
            raise EngineUnavailable("every step of the engine fails", reason="ENGINE_DEAD")
        silence = time.monotonic() - self._beat
        if self._busy and silence > stall_s:
            raise EngineUnavailable(
                f"the engine has made no progress for {silence:.0f} s", reason="ENGINE_STALLED"
            )

    def _main(self) -> None:
        self.loaded.set_running_or_notify_cancel()
        try:
            self._scheduler = scheduler = Scheduler(model := self._load(), self._max_batch)
        except BaseException as error:  # passed to the caller that waits for the model
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(model)
        with model.inference():
            self._loop(scheduler)

    def _loop(self, scheduler: Scheduler) -> None:
        while not self._stopping:
            self._take_commands(scheduler)
            self._beat = time.monotonic()
            try:
                scheduler.turn()
                self._failures = 0
            except Exception:
                self._failures += 1
                logger.exception("a step of the engine failed")
                scheduler.drop_all(EngineUnavailable("a step of the engine failed; try again"))
            self._flush()
        self._take_commands(scheduler)
        scheduler.drop_all(EngineUnavailable("the engine is closed", reason="ENGINE_CLOSED"))
        self._flush()

    def _take_commands(self, scheduler: Scheduler) -> None:
        """Move new sequences to the scheduler; sleep while there is no work."""
        while True:
            wait = scheduler.idle and not self._stopping
            self._busy = not wait
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            self._busy = True
            self._beat = time.monotonic()
            if command is not None:
                scheduler.add(command)
            elif wait:
                return
