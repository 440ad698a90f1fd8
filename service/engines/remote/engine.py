"""The remote engine class: one model on one or several servers. The HTTP client is imported when the
engine starts."""

from __future__ import annotations

import asyncio
import logging
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from service import metrics
from service.engines.common.closing import closed_error, or_closed
from service.engines.remote.backend import BackEnd, State
from service.engines.remote.chat import check_supported
from service.engines.remote.images import AS_THEY_ARE, Outgoing, Sizing
from service.engines.remote.members import Member, NotBegun
from service.errors import (
    EngineUnavailable,
    GrammarError,
    ServiceError,
    TooManyImages,
    VisionDisabled,
)
from service.types import (
    TEXT_AND_IMAGES,
    TEXT_ONLY,
    Capabilities,
    Chunk,
    Enforcer,
    EngineLoad,
    GenerateRequest,
    Grammar,
    GrammarKind,
)

START_PAUSE_S = 1.0
"""Time between two attempts to reach a server at the start, in seconds."""
DESCRIPTION = operator.attrgetter("description")
FIRST_PAUSE_S = 0.1
"""Pause before the second attempt of a request, in seconds; each further one is twice as long."""

log = logging.getLogger(__name__)


class RemoteEngine:
    """Asks other servers for answers, and accepts only complete ones.

    Args:
        members: the servers that run the model. find: looks for the only one at the start, in place
            of ``members``; raises ``NotBegun`` where there is none yet.
        name: name of the model for callers; None takes that of the server.
        vision: False refuses images. max_images: maximum number of images in a request.
        context_length: tokens of prompt and answer; None takes what the servers tell.
        sizing: the size in which images are sent.
        retries: further rounds of attempts where nothing was generated.
        start_s: how long the start waits for a server. patient: start also when none answers; the
            health check then finds the first one that does. Needs a name.
        on_progress: called with a short text about what the start waits for.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        name: str | None = None,
        vision: bool = True,
        max_images: int = 16,
        context_length: int | None = None,
        sizing: Sizing = AS_THEY_ARE,
        retries: int = 2,
        start_s: float = 60.0,
        patient: bool = False,
        on_progress: Callable[[str], None] | None = None,
        find: Callable[[], Awaitable[Member]] | None = None,
    ) -> None:
        self._members = tuple(members)
        self._find = find
        self._name = name
        self._vision = vision
        self._max_images = max_images
        self._context_length = context_length
        self._sizing = sizing
        self._retries = retries
        self._start_s = start_s
        self._patient = patient
        self._on_progress = on_progress or (lambda message: None)
        self._starting = asyncio.Lock()
        self._started = False
        self._closed = asyncio.Event()
        self._told: tuple[tuple[BackEnd | None, ...], Capabilities] | None = None
        """The capabilities, and the descriptions from which they were made."""
        self._turn = 0
        self._active = 0

    @property
    def active_requests(self) -> int:
        """Number of requests that have begun and not ended."""
        return self._active

    @property
    def capabilities(self) -> Capabilities:
        """What all reached servers can do. Raises ``EngineUnavailable`` before ``start`` has
        returned."""
        if not self._started:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
        known = tuple(map(DESCRIPTION, self._members))
        if self._told is None or any(map(operator.is_not, known, self._told[0])):
            self._told = (known, self._described())
        return self._told[1]

    async def start(self) -> None:
        """Wait until a server answers, unless patient. A second call returns at once.

        Raises ``EngineUnavailable`` when none can be used.
        """
        async with self._starting:
            if self._started:
                return
            await or_closed(self._reach_one(), self._closed)
            self._started = True

    async def prepare(self, grammar: Grammar) -> None:
        """Refuse a grammar that the servers do not take, as far as they tell; they compile the rest
        themselves."""
        self._ready()
        self._check_kind(grammar, self.capabilities)
        member = self._choose(set())
        if member.prepares:
            await or_closed(member.prepare(grammar), self._closed)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Run one request; see `service.engine.Engine.generate`."""
        self._ready()
        self._check(request)
        self._active += 1
        try:
            images = Outgoing(request.all_images, self._sizing)
            attempts = _Attempts(self._members, self._retries, request.deadline)
            while True:
                self._ready()
                self._turn += 1
                member = self._choose(attempts.tried)
                try:
                    async with aclosing(member.generate(request, images)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                    return
                except NotBegun as failed:
                    pause_s = attempts.failed(member, failed)
                await or_closed(asyncio.sleep(pause_s), self._closed)
        except ServiceError:
            if self._closed.is_set():
                raise closed_error() from None
            raise
        finally:
            self._active -= 1

    async def check_health(self) -> None:
        """Return if a server works; raise ``EngineUnavailable`` if none does."""
        self._ready()
        errors = await or_closed(self._check_all(), self._closed)
        if all(errors):
            raise EngineUnavailable("No model server works.", reason="BACKEND_UNREACHABLE")

    async def load(self) -> EngineLoad | None:
        """See `service.engine.TellsLoad`: the requests of this server alone."""
        if not self._started:
            return None
        return EngineLoad(self.capabilities.model, self._active, 0)

    async def close(self) -> None:
        """Close all connections. Requests in flight end with ``EngineUnavailable``."""
        self._closed.set()
        await asyncio.gather(*(member.close() for member in self._members))

    def _described(self) -> Capabilities:
        reached = [one.description for one in self._members if one.description is not None]
        found = reached or [one.assumed for one in self._members]
        # A server that was not reached may get the next request, so it counts here.
        why = next((one.not_enforced for one in self._known if one.not_enforced), "")
        vision = self._vision and all(one.vision.state is not State.NO for one in found)
        return Capabilities(
            model=self._name or found[0].model,
            engine="remote",
            modalities=TEXT_AND_IMAGES if vision else TEXT_ONLY,
            grammar_kinds=frozenset[GrammarKind].intersection(*(o.grammar_kinds for o in found)),
            sampling_options=frozenset[str].intersection(*(o.sampling_options for o in found)),
            context_length=self._context_length or _context_length(found),
            max_images=self._most_images(found) if vision else 0,
            enforcer=Enforcer.VALIDATION if why else Enforcer.MASK,
            not_enforced=why,
            schema_in_prompt=all(one.schema_in_prompt for one in found),
            restart_helps=False,
            details=self._details(found),
        )

    async def _reach_one(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._start_s
        while True:
            errors = await self._check_or_find()
            if not all(errors):
                return
            hopeless = all(error is not None and error.permanent for error in errors)
            if self._patient:
                log.warning("%s", self._why_not(errors))
                return
            if hopeless or loop.time() >= end:
                raise EngineUnavailable(self._why_not(errors), reason="BACKEND_UNREACHABLE")
            self._on_progress("waiting for the model server")
            await asyncio.sleep(min(START_PAUSE_S, max(0.0, end - loop.time())))

    def _why_not(self, errors: Sequence[NotBegun | None]) -> str:
        names = [one.name for one in self._members] or ["remote_discover"]
        lines = dict.fromkeys(f"{name}: {e}" for name, e in zip(names, errors, strict=True))
        return "No model server can be used. " + " ".join(lines)

    async def _check_or_find(self) -> list[NotBegun | None]:
        if not self._members and self._find is not None:
            try:
                self._members = (await self._find(),)
            except NotBegun as error:
                return [error]
        return await self._check_all()

    async def _check_all(self) -> list[NotBegun | None]:
        async def check(member: Member) -> NotBegun | None:
            try:
                await member.check()
            except NotBegun as error:
                return error
            finally:
                metrics.backend_up.labels(member.name).set(member.healthy)
            return None

        return list(await asyncio.gather(*map(check, self._members)))

    def _choose(self, tried: set[Member]) -> Member:
        """The server with the fewest requests, one that works if there is one. Servers that are
        equal take turns."""
        order = [*self._members[self._turn % len(self._members) :], *self._members]
        left = [one for one in order if one not in tried]
        return min(left, key=lambda one: (not one.healthy, one.in_flight))

    def _ready(self) -> None:
        if self._closed.is_set():
            raise closed_error()
        if not self._started:
            raise EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")

    def _check(self, request: GenerateRequest) -> None:
        if not all(one.takes_tools for one in self._members):
            check_supported(request)
        count, capabilities = len(request.all_images), self.capabilities
        if count and capabilities.modalities == TEXT_ONLY:
            raise VisionDisabled("this server was started without vision; send text only")
        if count > capabilities.max_images:
            raise TooManyImages(count, capabilities.max_images)
        if request.grammar is not None:
            self._check_kind(request.grammar, capabilities)

    @staticmethod
    def _check_kind(grammar: Grammar, capabilities: Capabilities) -> None:
        if grammar.kind not in capabilities.grammar_kinds:
            what = "is a kind of grammar that the model server does not take"
            raise GrammarError(grammar.kind.value, what, reason="GRAMMAR_KIND_UNSUPPORTED")

    @property
    def _known(self) -> list[BackEnd]:
        """What is known of each server, or assumed of one that was not reached."""
        return [one.description or one.assumed for one in self._members]

    def _most_images(self, found: Sequence[BackEnd]) -> int:
        told = [one.max_images for one in found if one.max_images is not None]
        return min([self._max_images, *told])

    def _details(self, found: Sequence[BackEnd]) -> dict[str, str]:
        """Names only: the addresses of servers are not for callers."""
        return {
            "backends": str(len(self._members)),
            "backend_kinds": ", ".join(sorted({one.kind for one in found})),
        }


@dataclass(slots=True)
class _Attempts:
    """The attempts of one request: every server once in a round, then a pause and another round."""

    members: Sequence[Member]
    rounds_left: int
    deadline: float | None
    tried: set[Member] = field(default_factory=set)
    _failed: list[NotBegun] = field(default_factory=list)
    _pause_s: float = FIRST_PAUSE_S

    def failed(self, member: Member, error: NotBegun) -> float:
        """Note a failure. Returns how long to wait before the next attempt, in seconds.

        Raises the error for the caller when there is no further attempt, also when it would begin
        after the deadline.
        """
        self.tried.add(member)
        self._failed.append(error)
        if len(self.tried) < len(self.members):
            return 0.0
        soonest = min((one.after_s for one in self._failed if one.after_s is not None), default=0.0)
        pause_s = max(self._pause_s, soonest)
        hopeless = all(one.permanent for one in self._failed)
        if hopeless or not self.rounds_left or self._too_late(pause_s):
            raise error.error from None
        self.rounds_left -= 1
        self._pause_s *= 2
        self.tried.clear()
        self._failed.clear()
        return pause_s

    def _too_late(self, pause_s: float) -> bool:
        now = asyncio.get_running_loop().time()
        return self.deadline is not None and now + pause_s >= self.deadline


def _context_length(found: Sequence[BackEnd]) -> int:
    """The smallest context; 0 where no server tells its own."""
    return min((one.context_length for one in found if one.context_length), default=0)
