"""Watches the health of an engine, and ends the server when the engine does not recover."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.engine import Engine
from service.errors import EngineUnavailable, ServiceError
from service.lifecycle import Phase
from service.logs import pairs
from service.settings import Settings
from service.types import GenerateRequest, Sampling

PROBE_LIMIT_S = 30.0
"""Limit on the generation of one token."""

log = logging.getLogger(__name__)


async def generate_one_token(engine: Engine, request_id: str) -> None:
    """Generate one token, as a health probe. Raises the errors of ``Engine.generate``."""
    async for _ in engine.generate(
        GenerateRequest(request_id, "Hello", sampling=Sampling(max_tokens=1))
    ):
        continue


class Heartbeat:
    """Checks the engine every ``health_interval_s``.

    After a failure, an idle engine must also generate one token before the server accepts calls
    again. While the engine still runs a call, a passed check is enough: behind long requests the
    token would wait, and a working engine would look dead.

    idle: returns True while the engine runs no call.
    progress: returns a counter that increases with every chunk of text that the engine produces for
        calls.
    enter: called with the phase after every check.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        idle: Callable[[], bool],
        progress: Callable[[], int],
        enter: Callable[[Phase], None],
    ) -> None:
        self._engine = engine
        self._interval_s = settings.health_interval_s
        self._limit_s = settings.unhealthy_exit_s
        self._idle = idle
        self._progress = progress
        self._enter = enter

    async def run(self) -> None:
        """Check until cancelled.

        Raises ``EngineUnavailable`` when the engine was unhealthy and made no progress for
        ``unhealthy_exit_s``, unless a new process would not help.
        """
        clock = asyncio.get_running_loop().time
        since: float | None = None
        seen = self._progress()
        while True:
            await asyncio.sleep(self._interval_s)
            error = await self._failure(failed_before=since is not None)
            if error is None:
                since = None
                self._enter(Phase.SERVING)
                continue
            log.warning("engine is unhealthy %s", pairs(error=error))
            self._enter(Phase.UNHEALTHY)
            if since is None or self._progress() != seen:
                since, seen = clock(), self._progress()
            elif self._engine.capabilities.restart_helps and clock() - since > self._limit_s:
                raise self._given_up()

    def _given_up(self) -> EngineUnavailable:
        text = f"The engine was unhealthy and made no progress for {self._limit_s:g} s."
        log.error("%s The process ends, so that a new one can be started.", text)
        return EngineUnavailable(text, reason="ENGINE_STALLED")

    async def _failure(self, *, failed_before: bool) -> Exception | None:
        """The error of the engine; None for a healthy engine."""
        error = await self._check()
        if (error is None and not failed_before) or not self._idle():
            return error
        failed = await self._probe()
        if failed is not None:
            return failed
        return None if error is None else await self._check()

    async def _check(self) -> Exception | None:
        return await self._outcome(self._engine.check_health, 2 * self._interval_s)

    async def _probe(self) -> Exception | None:
        return await self._outcome(
            lambda: generate_one_token(self._engine, "heartbeat"), PROBE_LIMIT_S
        )

    async def _outcome(
        self, work: Callable[[], Awaitable[None]], limit_s: float
    ) -> Exception | None:
        try:
            await asyncio.wait_for(work(), limit_s)
        except (ServiceError, asyncio.TimeoutError) as error:
            return error
        except Exception as error:  # then, too, the engine is unhealthy
            log.exception("the engine's health check failed")
            return error
        return None
