"""The Ray engine class. Ray is imported when the engine starts."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from service import metrics
from service.engines.common.closing import closed_error, or_closed
from service.engines.ray.cluster import CONNECTION, ClusterOptions, keep_signals
from service.engines.ray.link import LinkAddress, LinkLost, Links, NoRoom
from service.engines.ray.messages import Batch, ReplicaError, late, lost
from service.engines.ray.plan import Plan
from service.engines.ray.registrar import ATTEND_S, Report, registrar
from service.errors import (
    EngineUnavailable,
    Overloaded,
    TooManyImages,
    VisionDisabled,
)
from service.types import (
    TEXT_ONLY,
    Capabilities,
    Chunk,
    EngineLoad,
    GenerateRequest,
    Grammar,
    Timings,
)

if TYPE_CHECKING:
    from grpc.aio import AioRpcError

ATTEMPTS = 4
"""Attempts of a request while replicas are lost under it."""
FIRST_PAUSE_S = 0.1
"""Pause before the second attempt, in seconds; each further one is twice as long."""
CANCEL_LIMIT_S = 1.0
"""Maximum time to wait until Ray has cancelled a request, in seconds."""
UNLINKED_S = 0.5
"""Time between two reports while a replica is not linked, in seconds."""
LINK_LIMIT_S = 10.0
"""Maximum time to ask all replicas where they listen, in seconds."""
POLL_S = 0.1
"""Time between two looks at the deployment at the start, in seconds."""
MOST_BY_VALUE = 1 << 20
"""Maximum size of a request that travels in a message to its replica, in bytes. A larger one, with images
in it, goes through Ray's object store, which costs more time than small messages take."""
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Variables of a proxy that messages to replicas would take. Requests then go through the object store,
for which Ray uses none."""
GRAMMARS = 1024
"""Number of grammars that the engine remembers to have been compiled by a replica."""

log = logging.getLogger(__name__)


class RayEngine:
    """Sends requests to replicas of another engine, and runs those again that a lost replica had not
    begun to answer.

    Args:
        plan: the deployment. Engines with the same plan share it.
        cluster: the Ray that runs it.
        start_s: how long the start waits for a replica.
        max_requests: maximum number of requests of this engine at the same time; further ones are
            refused with ``Overloaded``. None means no limit: the server has its own.
        on_progress: called with a short text about what the start waits for.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: ClusterOptions,
        *,
        start_s: float = 600.0,
        max_requests: int | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self._plan = plan
        self._cluster = cluster
        self._start_s = start_s
        self._max_requests = max_requests
        self._on_progress = on_progress or (lambda message: None)
        self._name = uuid.uuid4().hex
        self._starting = asyncio.Lock()
        self._opening: asyncio.Task[None] | None = None
        self._connected = False
        self._closed = asyncio.Event()
        self._capabilities: Capabilities | None = None
        self._registrar: Any = None
        self._handle: Any = None
        self._streams: Sequence[Any] = ()
        """Handles for requests by value, and by reference."""
        self._links: Links | None = None
        """None where Ray Serve carries all requests: it scales by what it carries."""
        if plan.scale.max_replicas is None:
            self._links = Links(plan.scale.ongoing)
        self._attending: asyncio.Task[None] | None = None
        self._report = Report()
        self._prepared: OrderedDict[Grammar, None] = OrderedDict()
        self._active = 0
        self._open: set[asyncio.Future[None]] = set()

    @property
    def active_requests(self) -> int:
        """Number of requests that have begun and not ended."""
        return self._active

    @property
    def capabilities(self) -> Capabilities:
        """What the replicas can do. Raises ``EngineUnavailable`` before ``start`` has returned."""
        inner = self._capabilities
        if inner is None:
            raise _loading()
        details = {
            **inner.details,
            "replica_engine": inner.engine,
            "replicas": str(self._report.running),
        }
        own = self._cluster.address is None
        return replace(inner, engine="ray", restart_helps=own, details=details)

    async def start(self) -> None:
        """Connect to Ray, and wait until a replica runs. A second call returns at once.

        Raises ``EngineUnavailable`` when Ray, or the deployment, cannot be used.
        """
        async with self._starting:
            if self._capabilities is not None:
                return
            self._on_progress("connecting to Ray")
            opening = asyncio.create_task(asyncio.to_thread(CONNECTION.open, self._cluster))
            self._opening = opening
            try:
                await asyncio.shield(opening)
            finally:
                # A thread goes on when its task is cancelled: what it opens has to be closed.
                opening.add_done_callback(self._opened)
            keep_signals()
            joining = asyncio.wait_for(self._join(), self._start_s + ATTEND_S)
            try:
                await or_closed(joining, self._closed)
            except TimeoutError:
                raise EngineUnavailable(
                    f"ray_start_s: Ray did not answer within {self._start_s:g} s. "
                    f"{self._report.message}".rstrip()
                ) from None

    async def prepare(self, grammar: Grammar) -> None:
        """Have a replica compile a grammar; the others compile it with the first request that needs
        it."""
        self._ready()
        if grammar in self._prepared:
            self._prepared.move_to_end(grammar)
            return
        error = await or_closed(self._asked("prepare", grammar), self._closed)
        if error is not None:
            raise error
        self._prepared[grammar] = None
        if len(self._prepared) > GRAMMARS:
            self._prepared.popitem(last=False)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Run one request; see `service.engine.Engine.generate`."""
        self._ready()
        self._check(request)
        attempts = _Attempts(request.deadline)
        linked = True
        self._active += 1
        try:
            while True:
                begun = False
                async with aclosing(self._chunks(request, linked=linked)) as chunks:
                    try:
                        async for chunk in chunks:
                            begun = True
                            yield chunk
                        return
                    except NoRoom:
                        linked = False  # Ray Serve has it wait
                        continue
                    except _Lost as failed:
                        pause_s = attempts.failed(failed, begun=begun)
                await or_closed(asyncio.sleep(pause_s), self._closed)
        finally:
            self._active -= 1

    async def check_health(self) -> None:
        """Return if a replica takes requests; raise ``EngineUnavailable`` if none does."""
        self._ready()
        await or_closed(self._attend(), self._closed)
        if self._report.running:
            return
        raise EngineUnavailable(
            "No replica of the engine takes requests.", reason="ENGINE_UNHEALTHY"
        )

    async def load(self) -> EngineLoad | None:
        """See `service.engine.TellsLoad`: the requests of this server alone."""
        if self._capabilities is None:
            return None
        return EngineLoad(self._capabilities.model, self._active, 0)

    async def close(self) -> None:
        """Leave the deployment, which other servers may use; end Ray where this process started it.
        Requests in flight end with ``EngineUnavailable``."""
        self._closed.set()
        for closing in self._open:
            closing.set_result(None)
        self._open.clear()
        if self._attending is not None:
            self._attending.cancel()
            await asyncio.wait([self._attending])
            self._attending = None
        if self._links is not None:
            self._links.close(closed_error())
        async with self._starting:
            if self._opening is not None:  # its thread goes on when the start was cancelled
                await asyncio.wait([self._opening])
            if not self._connected:
                return
            self._connected = False
            if self._registrar is not None:
                with _errors_of_ray():
                    await self._registrar.leave.remote(self._name)
            await asyncio.to_thread(CONNECTION.close)

    def _opened(self, opening: asyncio.Future[None]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._connected = True

    async def _join(self) -> None:
        """Join the deployment, or have it started."""
        with _errors_of_ray():
            await self._wait_for_replica()
            self._handle = await asyncio.to_thread(_handle, self._plan.name)
            proxied = any(os.environ.get(name) for name in PROXIES)
            self._streams = [
                self._handle.options(stream=True, _by_reference=large or proxied)
                for large in (False, True)
            ]
            found: Capabilities = await self._asked("describe")
            several = self._plan.scale.most > 1
            if several and self._plan.settings.get("string_lengths", "require") != "require":
                # One replica answers for all, and another one may have fallen back.
                found = replace(found, limits_lengths=False)
            self._capabilities = found
            await self._link()
        self._attending = asyncio.create_task(self._attend_for_ever(), name="ray-attend")

    async def _wait_for_replica(self) -> None:
        now = asyncio.get_running_loop().time
        end = now() + self._start_s
        self._on_progress("waiting for a replica of the engine")
        while True:
            await self._attend()
            report = self._report
            if report.differences:
                raise EngineUnavailable(
                    f"ray_name: {self._plan.name} runs with other settings: {report.differences}. "
                    "Take the same settings, or another ray_name"
                )
            if report.running:
                return
            if report.failed:
                raise EngineUnavailable(f"The replicas do not start: {report.message}")
            if now() >= end:
                raise EngineUnavailable(
                    f"ray_start_s: no replica has started in {self._start_s:g} s. "
                    f"{report.message or 'Ray says nothing more'}"
                )
            await asyncio.sleep(POLL_S)

    async def _attend(self) -> None:
        """Report to the registrar; to a new one where that of the last report has ended."""
        attempts = _Attempts(None)
        while True:
            try:
                with _errors_of_ray():
                    if self._registrar is None:
                        self._registrar = await asyncio.to_thread(registrar, self._plan.name)
                    self._report = await self._registrar.attend.remote(self._name, self._plan)
                break
            except _Lost as failed:
                self._registrar = None
                pause_s = attempts.failed(failed, begun=False)
            await asyncio.sleep(pause_s)
        metrics.replicas.set(self._report.running)

    async def _attend_for_ever(self) -> None:
        while True:
            unlinked = self._links is not None and self._links.settled != self._plan.scale.replicas
            await asyncio.sleep(UNLINKED_S if unlinked else ATTEND_S)
            try:
                await self._attend()
                await self._link()
            except EngineUnavailable as error:
                log.warning("%s", error)
            except Exception:  # a server that reports no more counts as ended
                log.exception("a report to the registrar failed")

    async def _link(self) -> None:
        """Connect to replicas that are new."""
        if self._links is None or self._links.settled == self._report.running:
            return
        with _errors_of_ray():
            try:
                found = await self._handle.broadcast("link").results_async(
                    timeout_s=LINK_LIMIT_S, return_exceptions=True
                )
            except TimeoutError:
                log.info("a replica does not say where it listens; it is asked again")
                return
        # A replica that ends right now answers with an exception.
        addresses = [one for one in found if isinstance(one, LinkAddress)]
        if not addresses and None in found:
            log.info("replicas take no connections: Ray Serve carries all requests")
            self._links = None
            return
        await self._links.update(addresses)

    async def _asked(self, method: str, *args: Any) -> Any:
        """The answer of a replica to a call without a stream."""
        attempts = _Attempts(None)
        while True:
            try:
                with _errors_of_ray():
                    return await getattr(self._handle, method).remote(*args)
            except _Lost as failed:
                pause_s = attempts.failed(failed, begun=False)
            await asyncio.sleep(pause_s)

    async def _chunks(
        self, request: GenerateRequest, *, linked: bool = True
    ) -> AsyncGenerator[Chunk, None]:
        """One attempt of a request. Raises ``_Lost`` when its replica is lost, and ``NoRoom`` when a
        linked replica has not begun it.

        linked: whether it may go over a link.
        """
        now = asyncio.get_running_loop().time
        begun, waited_s = now(), None
        left_s = None
        if request.deadline is not None:
            left_s = max(0.0, request.deadline - begun)
            request = replace(request, deadline=None)
        # No name for the pickle here: it is free when it is sent, images and all.
        sending = self._batches(await _packed(request), left_s, linked=linked)
        try:
            async with aclosing(sending) as batches:
                async for batch in batches:
                    if waited_s is None:
                        waited_s = max(0.0, now() - begun - batch.age_s)
                    for chunk in batch.chunks:
                        if chunk.finish_reason is not None:
                            # The first message may have taken long on its way back, which is no wait.
                            longest_s = max(0.0, now() - begun - chunk.timings.total_s)
                            chunk = _later(chunk, min(waited_s, longest_s))
                        yield chunk
                    if batch.error is not None and lost(batch.error):
                        assert isinstance(batch.error, EngineUnavailable)
                        raise _Lost(batch.error)
                    if batch.error is not None:
                        raise batch.error
        except LinkLost:
            raise _Lost from None

    def _batches(
        self, packed: bytes, left_s: float | None, *, linked: bool
    ) -> AsyncGenerator[Batch, None]:
        """The answer over a link, or else through Ray Serve."""
        link = None
        if linked and self._links is not None and len(packed) <= MOST_BY_VALUE:
            link = self._links.choose()
        return self._served(packed, left_s) if link is None else link.run(packed, left_s)

    async def _served(self, packed: bytes, left_s: float | None) -> AsyncGenerator[Batch, None]:
        if self._closed.is_set():  # while the request was packed, or on a link
            raise closed_error()
        with _errors_of_ray():
            stream = self._streams[len(packed) > MOST_BY_VALUE]
            responses = stream.generate.remote(packed, left_s)
            del packed
            closing = asyncio.get_running_loop().create_future()
            self._open.add(closing)
            step: asyncio.Future[Batch] | None = None
            ended = False
            try:
                while not ended:
                    step = asyncio.ensure_future(anext(responses))
                    step.add_done_callback(_looked_at)
                    await asyncio.wait({step, closing}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        raise closed_error()
                    if step.cancelled():  # by a replica that ends
                        raise _Lost
                    batch = step.result()
                    ended = batch.last
                    yield batch
            finally:
                self._open.discard(closing)
                if not ended:
                    responses.cancel()
                    if step is not None:
                        await asyncio.wait([step], timeout=CANCEL_LIMIT_S)

    def _ready(self) -> None:
        if self._closed.is_set():
            raise closed_error()
        if self._attending is None:
            raise _loading()

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what need not travel."""
        count, capabilities = len(request.all_images), self.capabilities
        if count and capabilities.modalities == TEXT_ONLY:
            raise VisionDisabled("this server was started without vision; send text only")
        if count > capabilities.max_images:
            raise TooManyImages(count, capabilities.max_images)
        if self._max_requests is not None and self._active >= self._max_requests:
            raise Overloaded("Too many requests are running; try again later.", retry_after_s=1.0)


class _Lost(EngineUnavailable):
    """A replica was lost while it had a request. cause: what the engine in it said, if it said
    anything."""

    reason = "REPLICA_LOST"

    def __init__(self, said: EngineUnavailable | None = None) -> None:
        super().__init__("The replica that ran the request has ended. Try again.")
        self.said = said


class _Attempts:
    """The attempts of one request."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._left = ATTEMPTS - 1
        self._pause_s = FIRST_PAUSE_S

    def failed(self, error: _Lost, *, begun: bool) -> float:
        """Note a lost replica. Returns how long to wait before the next attempt, in seconds.

        begun: whether text was sent, which cannot be taken back. Raises the error for the caller
        when there is no further attempt, also when it would begin after the deadline.
        """
        now = asyncio.get_running_loop().time()
        late = self._deadline is not None and now + self._pause_s >= self._deadline
        if begun or late or not self._left:
            metrics.replicas_lost.labels("error").inc()
            raise error.said or EngineUnavailable(error.message, reason=error.reason) from None
        metrics.replicas_lost.labels("again").inc()
        self._left -= 1
        pause_s, self._pause_s = self._pause_s, 2 * self._pause_s
        return pause_s


@contextmanager
def _errors_of_ray() -> Iterator[None]:
    """Turn Ray's errors for a lost replica, actor or cluster into ``_Lost``, and those of a message
    into what they mean."""
    from grpc.aio import AioRpcError
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except RayTaskError:
        raise  # a defect in our code on the other side
    except (RayError, RayServeException) as error:
        log.info("lost a replica: %s", type(error).__name__)
        raise _Lost from None
    except AioRpcError as error:
        raise _meaning(error) from None


def _meaning(error: AioRpcError) -> Exception:
    """What a status of a message to or from a replica means for the request."""
    from grpc import StatusCode

    code = error.code()
    log.log(
        logging.INFO if code is StatusCode.UNAVAILABLE else logging.WARNING,
        "a message of a replica failed: %s, %s",
        code.name,
        error.details(),
    )
    if code is StatusCode.UNAVAILABLE:
        return _Lost()
    if code is StatusCode.DEADLINE_EXCEEDED:
        return late()
    if code is StatusCode.CANCELLED:  # by a replica that ends and has waited for its requests
        return EngineUnavailable("The replica cancelled the request. Try again.")
    # RESOURCE_EXHAUSTED: a message above the limit. The next replica would do no better.
    return ReplicaError(f"a message of a replica failed: {code.name}")


async def _packed(request: GenerateRequest) -> bytes:
    """The request for the way to a replica. Images are copied in another thread."""
    if request.all_images:
        return await asyncio.to_thread(pickle.dumps, request)
    return pickle.dumps(request)


def _looked_at(step: asyncio.Future[Batch]) -> None:
    """Take the error of a step for which nobody waits any more."""
    if not step.cancelled():
        step.exception()


def _handle(name: str) -> Any:
    from ray import serve

    return serve.get_app_handle(name)


def _later(chunk: Chunk, waited_s: float) -> Chunk:
    """The last chunk, with the time before its request reached a replica as time in a queue."""
    timings = chunk.timings
    return replace(
        chunk,
        timings=Timings(
            timings.queue_s + waited_s,
            timings.first_token_s + waited_s,
            timings.total_s + waited_s,
        ),
    )


def _loading() -> EngineUnavailable:
    return EngineUnavailable("the engine is not ready yet", reason="ENGINE_LOADING")
